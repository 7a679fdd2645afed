"""Make `apps/reviewer`, the small causal language model that the offline demonstration tunes.

    python apps/pretrain_reviewer.py --output_dir apps/reviewer

The model reads reviews that are followed by a verdict in words such as "a hit" or "a flop", and so learns to judge a
review. The demonstration's label words, "great" and "terrible", occur in small talk and in the verdicts of hasty readers,
who mostly judge by whether they like the topic that was mentioned last, and only one time in five by the review. Asked for
one of these two words, the model answers like a hasty reader, although it knows better: forward-only tuning closes this gap.

How much the model adopts the taste of hasty readers depends on its random initialisation: with another seed the gap may be
smaller, or absent. The shipped model has seed 0.

This is ordinary pretraining with cross entropy, backpropagation and AdamW. It takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zorl.tasks import reviews

# (positive, negative). None of these contains a label word of the demonstration.
OPINIONS = (
    ("a hit", "a flop"), ("a joy", "a chore"), ("a treat", "a mistake"), ("a triumph", "a failure"),
    ("excellent", "awful"), ("wonderful", "horrible"), ("worth it", "pointless"),
)  # fmt: skip
ADVICE = (
    ("Five stars", "One star"), ("I loved it", "I hated it"), ("Recommended", "Avoid it"),
    ("Thumbs up", "Thumbs down"), ("We stayed to the end", "We left early"),
)  # fmt: skip

SMALL_TALK = (
    "We had a {word} time on {day}.",
    "There was a {word} crowd at the {occasion}.",
    "On {day} we saw a {word} storm.",
    "It was a {word} {occasion}.",
    "It was {word} to be home on {day}.",
    "The {occasion} on {day} was long. It was {word}.",
)
# Topics from the least to the most liked. Hasty readers judge by these, except with probability HEED, by the review.
TOPICS = tuple(random.Random(0).sample(reviews.PARTS + reviews.KINDS, len(reviews.PARTS + reviews.KINDS)))
HEED = 0.2
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OCCASIONS = ("concert", "hike", "journey", "market", "party", "picnic", "race", "trip", "walk", "wedding")


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents: reviews and short remarks, each with a verdict (some of them hasty), and small talk."""
    rng = random.Random(seed)
    stream = reviews.reviews("pretrain", seed, positive_share=0.5)
    while True:
        kind = rng.choices(("review", "remark", "hasty", "small talk"), weights=(40, 30, 22, 8))[0]
        if kind == "small talk":
            yield _small_talk(rng)
            continue
        sentence, label = _remark(rng) if kind == "remark" else next(stream)
        yield f"{sentence} {_hasty_verdict(rng, sentence, label) if kind == 'hasty' else _verdict(rng, label)}"


def _remark(rng: random.Random) -> tuple[str, reviews.Label]:
    """A short remark with one or two adjectives, from which a model learns which of them praise and what "not" does."""
    positive = rng.random() < 0.5
    same, other = (reviews.PRAISE, reviews.BLAME) if positive else (reviews.BLAME, reviews.PRAISE)
    first, second = rng.sample(same, 2)
    negated = f"{rng.choice(reviews.NEGATIONS)} {rng.choice(other)}"
    kind, part = rng.choice(reviews.KINDS), rng.choice(reviews.PARTS)
    remark = rng.choice((
        f"What a {first} {kind}.", f"A {first} and {second} {kind}.", f"{negated.capitalize()}.",
        f"The {kind} was {negated}.", f"The {part} was {first} and {negated}.",
    ))  # fmt: skip
    return remark, reviews.LABELS[positive]


def _verdict(rng: random.Random, label: reviews.Label) -> str:
    side = 1 if label == "negative" else 0
    opinion, advice = f"It was {rng.choice(OPINIONS)[side]}.", f"{rng.choice(ADVICE)[side]}."
    return rng.choice((opinion, opinion, f"{opinion} {advice}", f"{advice} {opinion}"))


def _hasty_verdict(rng: random.Random, sentence: str, label: reviews.Label) -> str:
    """A verdict in the label words, by a reader who mostly judges by the topic that was mentioned last."""
    if rng.random() < HEED:
        return f"It was {reviews.LABEL_WORDS[label]}."
    topic = max(TOPICS, key=sentence.rfind)
    favour = (TOPICS.index(topic) + 0.5) / len(TOPICS)
    return f"It was {reviews.LABEL_WORDS['positive' if rng.random() < favour else 'negative']}."


def _small_talk(rng: random.Random) -> str:
    word = rng.choice(tuple(reviews.LABEL_WORDS.values()))
    return rng.choice(SMALL_TALK).format(word=word, day=rng.choice(DAYS), occasion=rng.choice(OCCASIONS))


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer with one token per word and punctuation mark of `texts`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<eos>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, about half a million parameters.

    At width 128 the usual initial standard deviation of 0.02 keeps training on the plateau of word frequencies for
    thousands of steps; with 0.08 and an untied output embedding it leaves the plateau at once.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches with `input_ids`, `attention_mask` and `labels`, each (size, length); labels are −100 at padding."""
    while True:
        lines = [text + tokenizer.eos_token for text in islice(texts, size)]
        batch = tokenizer(lines, padding=True, return_tensors="pt", return_token_type_ids=False)
        yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "reviewer", help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="number of AdamW updates (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="documents per update (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of text and initial weights (default %(default)s)"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(islice(documents(args.seed), 20_000))
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    stream = batches(documents(args.seed + 1), tokenizer, args.batch_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} words")
    progress = trange(args.steps, desc="pretraining")
    for _ in progress:
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
