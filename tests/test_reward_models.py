"""Sequence classifiers as scorers, and reward models as TRL passes them. Tiny random models of real architectures."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from zorl.reward_functions import RewardFunctions
from zorl.reward_models import RewardModel, SequenceClassifier, text_of

TEXTS = ["the film was great", "terrible", "a very odd ending , and a great story", "it was bad", "who wrote it ?"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPREAD = {"initializer_range": 0.5, "max_position_embeddings": 64}


@pytest.fixture
def bert_tokenizer(parts):
    return copy.deepcopy(parts("bert").tokenizer)


@pytest.fixture
def chat_tokenizer(parts):
    return copy.deepcopy(parts("qwen2").tokenizer)


def bert(tokenizer, labels: int) -> BertForSequenceClassification:
    torch.manual_seed(labels)
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id, **SHAPE, **SPREAD)
    )


def qwen(tokenizer, labels: int) -> Qwen2ForSequenceClassification:
    torch.manual_seed(labels)
    return Qwen2ForSequenceClassification(
        Qwen2Config(vocab_size=len(tokenizer), num_labels=labels, num_key_value_heads=2, **SHAPE, **SPREAD)
    )


@pytest.fixture
def saved(tmp_path: Path, bert_tokenizer) -> Path:
    """A reward model's checkpoint."""
    folder = tmp_path / "judge-1"
    bert(bert_tokenizer, 1).save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    return folder


def one_by_one(module, tokenizer, texts, **options) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(**tokenizer(text=[t], return_tensors="pt", **options)).logits for t in texts])


def test_logits_keep_the_order_of_texts_whatever_the_batches(bert_tokenizer):
    model = bert(bert_tokenizer, 3).eval()
    expected = one_by_one(model, bert_tokenizer, TEXTS)
    for batch_size in (1, 2, 32):
        logits = SequenceClassifier(model, bert_tokenizer, batch_size=batch_size).logits(TEXTS)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).min() > 0.01


def test_dropout_is_off_and_no_graph_is_kept(bert_tokenizer):
    model = bert(bert_tokenizer, 2).train()
    scorer = SequenceClassifier(model, bert_tokenizer)
    first, second = scorer.logits(TEXTS), scorer.logits(TEXTS)
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_a_decoder_without_a_pad_token_reads_the_last_real_token(chat_tokenizer):
    chat_tokenizer.pad_token = None
    model = qwen(chat_tokenizer, 1).eval()
    scorer = SequenceClassifier(model, chat_tokenizer)
    expected = one_by_one(model, chat_tokenizer, TEXTS)
    torch.testing.assert_close(scorer.logits(TEXTS), expected, atol=1e-5, rtol=1e-5)


def test_empty_texts_have_a_score_even_alone(bert_tokenizer, chat_tokenizer):
    for tokenizer, model in ((bert_tokenizer, bert(bert_tokenizer, 1)), (chat_tokenizer, qwen(chat_tokenizer, 1))):
        scorer = SequenceClassifier(model, tokenizer)
        for special in (True, False):
            logits = scorer.logits(["", ""], special_tokens=special)
            assert logits.shape == (2, 1)
            assert logits.isfinite().all()


def test_texts_are_cut_at_the_tokenizers_limit(bert_tokenizer):
    bert_tokenizer.model_max_length = 8
    scorer = SequenceClassifier(bert(bert_tokenizer, 2), bert_tokenizer)
    long = "great " * 200
    torch.testing.assert_close(scorer.logits([long]), scorer.logits(["great " * 6]), atol=1e-6, rtol=0)


def test_texts_are_cut_to_what_the_model_reads_where_the_tokenizer_has_no_limit(bert_tokenizer):
    model = bert(bert_tokenizer, 2)  # of 64 positions
    scorer = SequenceClassifier(model, bert_tokenizer)
    assert bert_tokenizer.model_max_length > 10**9
    expected = scorer.logits(["great " * 62])  # between [CLS] and [SEP]
    torch.testing.assert_close(scorer.logits(["great " * 200]), expected, atol=1e-6, rtol=0)


def test_a_path_is_loaded_with_its_tokenizer_in_float32(saved, bert_tokenizer):
    halved = bert(bert_tokenizer, 1).bfloat16()
    halved.save_pretrained(saved)
    scorer = SequenceClassifier(saved)
    assert {p.dtype for p in scorer.module.parameters()} == {torch.float32}
    assert scorer.name == "judge-1"
    torch.testing.assert_close(
        scorer.logits(TEXTS), one_by_one(halved.float().eval(), bert_tokenizer, TEXTS), atol=1e-4, rtol=1e-4
    )


def test_pickled_weights_are_refused(saved, bert_tokenizer):
    (saved / "model.safetensors").unlink()
    torch.save(bert(bert_tokenizer, 1).state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load '.*judge-1' as a sequence-classification model"):
        SequenceClassifier(saved)


def test_a_checkpoint_without_a_trained_head_is_refused(saved, bert_tokenizer):
    config = BertConfig(vocab_size=len(bert_tokenizer), **SHAPE)
    BertForMaskedLM(config).save_pretrained(saved)
    with pytest.raises(
        ValueError, match=r"not a trained sequence classifier: its checkpoint lacks .*classifier\.weight"
    ):
        SequenceClassifier(saved)


def test_a_missing_folder_hints_at_callables():
    with pytest.raises(ValueError, match=r"cannot load './no/such' .*a reward function is given as a callable"):
        SequenceClassifier("./no/such")


def test_a_module_that_names_no_tokenizer_needs_one(bert_tokenizer):
    with pytest.raises(ValueError, match="does not say where its tokenizer is"):
        SequenceClassifier(bert(bert_tokenizer, 1))


def test_a_batch_size_of_zero_is_refused(bert_tokenizer):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SequenceClassifier(bert(bert_tokenizer, 1), bert_tokenizer, batch_size=0)


def test_a_reward_model_reads_prompt_and_completion_as_trl_does(bert_tokenizer):
    model = bert(bert_tokenizer, 1).eval()
    prompts, completions = ["the film ", "was it "], ["was great", "odd and terrible ?"]
    rewards = RewardModel(model, bert_tokenizer)(prompts=prompts, completions=completions, label=["a", "b"])
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    expected = one_by_one(model, bert_tokenizer, whole, add_special_tokens=False)[:, 0]
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("answer", ["Great!", [{"role": "assistant", "content": "Great!"}]])
def test_a_reward_model_reads_conversations_through_the_chat_template(chat_tokenizer, answer):
    model = qwen(chat_tokenizer, 1).eval()
    question = [{"role": "user", "content": "Was it good?"}]
    (reward,) = RewardModel(model, chat_tokenizer)(prompts=[question], completions=[answer])
    text = "<|user|>\nWas it good?<|end|>\n<|assistant|>\nGreat!<|end|>\n"
    expected = one_by_one(model, chat_tokenizer, [text], add_special_tokens=False)
    assert reward == pytest.approx(expected.item(), abs=1e-5)


def test_reward_models_by_path_and_as_modules_stand_beside_functions(saved, bert_tokenizer):
    model = bert(bert_tokenizer, 1)
    rewards = RewardFunctions(
        [str(saved), model, lambda completions, **columns: [1.0] * len(completions)],
        weights=[1.0, 1.0, 10.0],
        processing_classes=[None, bert_tokenizer, None],
    )
    result = rewards(["it ", "it "], ["was great", "was bad"], [[1], [2]], {})
    assert rewards.names == ("judge-1", "BertForSequenceClassification", "<lambda>")
    torch.testing.assert_close(result.values[0], result.values[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(result.total, 2 * result.values[0] + 10, atol=1e-5, rtol=0)
    assert not model.training


def test_a_classifier_of_two_labels_is_no_reward_model(bert_tokenizer):
    with pytest.raises(ValueError, match=r"has 2 labels where a reward model has one.*zorl\.rewards\.classifier"):
        RewardFunctions(bert(bert_tokenizer, 2), processing_classes=bert_tokenizer)


def test_a_module_without_a_configuration_is_checked_when_it_runs(bert_tokenizer):
    class Wrapped(nn.Module):  # as torch.compile or a wrapper of the user's own may hide the configuration
        def __init__(self, labels: int) -> None:
            super().__init__()
            self.inner = bert(bert_tokenizer, labels)

        def forward(self, **inputs):
            return self.inner(**inputs)

    assert len(RewardModel(Wrapped(1), bert_tokenizer)(prompts=["it "], completions=["was"])) == 1
    with pytest.raises(ValueError, match="returns 2 logits per text where a reward model returns one"):
        RewardModel(Wrapped(2), bert_tokenizer)(prompts=["it "], completions=["was"])


def test_reward_models_are_picklable(saved):
    model = RewardModel(saved)
    again = pickle.loads(pickle.dumps(model))
    assert again.__name__ == "judge-1"
    values = [m(prompts=["it "], completions=["was"]) for m in (model, again)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)  # tensors may lie otherwise in memory: other vector code


def test_text_of_reads_strings_and_the_last_message():
    assert text_of("yes") == "yes"
    assert text_of([{"role": "assistant", "content": "no"}, {"role": "assistant", "content": "yes"}]) == "yes"
    assert text_of([]) == ""
