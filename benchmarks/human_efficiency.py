"""What a click is worth: how far a simulated person's verdicts move a model, and what the text pays for it.

    python benchmarks/human_efficiency.py --model MODEL           # all cells that are not done yet (a story-telling model)
    python benchmarks/human_efficiency.py --model MODEL --jobs 2  # two at a time, one thread each
    python benchmarks/human_efficiency.py --report                # docs/human_efficiency.md and .png from the cells

A cell is one run of 500 verdicts, written to `benchmarks/results/human_efficiency/` when it is done, so that an
interrupted benchmark goes on where it was. The rater has one hidden preference, turns 10% of its verdicts round and calls
10% ties.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import machine
from stories import HELD_OUT, TUNING

from zorl import MeZO, Prompt
from zorl.answer_logits import AnswerLogits, TokenAnswer, chosen, divergence
from zorl.comparisons import Comparison
from zorl.directions import derive_seed
from zorl.drift import distinct_2, starting_evaluator
from zorl.generation import Generation
from zorl.judge_objective import JudgeObjective
from zorl.models import load_model, load_processing_class
from zorl.output_bias import add_output_bias, output_bias_name
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.preference_replay import Preference, PreferenceReplay
from zorl.probe import CENTRE, Choice
from zorl.rewards import RewardJudge

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benchmarks" / "results" / "human_efficiency"
SEEDS = (0, 1, 2, 3, 4)
VERDICTS = (50, 100, 200, 500)
NOISE = TIES = 0.1
TOKENS, TEMPERATURE = 64, 0.8
DRAWS = 5  # answers of the model that is measured to each held-out prompt
START_DRAWS = 20  # of the starting model, shared by all cells
BOUND = 0.1  # of perplexity and distinct-2

FRIENDSHIP = re.compile(r"\b(friend\w*|together|shar(?:e|ed|ing)|hug\w*|buddy|pals?)\b", re.IGNORECASE)


def mentions_friendship(completions: Sequence[str], **columns: Any) -> list[float]:
    """Words of friendship, three at most."""
    return [min(len(FRIENDSHIP.findall(text)), 3) for text in completions]


def shorter_first_sentence(completions: Sequence[str], **columns: Any) -> list[float]:
    """Words before the first full stop, exclamation or question mark; the fewer, the better."""
    return [-len(re.split(r"[.!?]", text, maxsplit=1)[0].split()) for text in completions]


def more_dialogue(completions: Sequence[str], **columns: Any) -> list[float]:
    """Words between quotation marks, fifteen at most."""
    return [min(sum(len(part.split()) for part in text.split('"')[1::2]), 15) for text in completions]


PREFERENCES: dict[str, Callable[..., list[float]]] = {
    "mentions friendship": mentions_friendship,
    "shorter first sentence": shorter_first_sentence,
    "more dialogue": more_dialogue,
}


@dataclass(frozen=True)
class Method:
    """How verdicts become steps. With `replay` a pair is two answers of the current model, else the sides of a direction."""

    label: str
    output_bias: bool  # else all parameters
    replay: bool
    lr: float
    epsilon: float
    n_spsa: int = 1
    prompts: int = 1  # verdicts per direction; with replay, pairs that are judged before the next are generated
    brake: float = 0.0
    verdicts_per_step: int = 4  # of replay
    pairs_per_step: int = 16
    comparison: Comparison = "share"


METHODS: dict[str, Method] = {
    "replay": Method("replay of verdicts, output bias", True, True, 0.4, 0.1, n_spsa=32, prompts=10, brake=0.05),
    "pure": Method("verdicts alone, output bias", True, False, 0.12, 0.5, prompts=4),
    # Ablations: one change each; they may rest on fewer seeds.
    "no_brake": Method("replay without the brake", True, True, 0.4, 0.1, n_spsa=32, prompts=10),
    "sign": Method("verdicts alone, sign", True, False, 0.12, 0.5, prompts=4, comparison="sign"),
    "logit": Method("verdicts alone, logit", True, False, 0.12, 0.5, prompts=4, comparison="logit"),
    "all": Method("verdicts alone, all parameters", False, False, 0.002, 0.02, prompts=4),
}


class Models:
    """The tuned model and the starting one, each with what generates and what reads answers."""

    def __init__(self, path: str, output_bias: bool) -> None:
        model, tokenizer = load_model(path), load_processing_class(path)
        if output_bias:
            add_output_bias(model)
        self.parameters = ParameterSet(select(model, output_bias_name(model) if output_bias else None))
        evaluators = Scratch(model, self.parameters), starting_evaluator(model, self.parameters)
        self.now, self.start = (
            Generation(e, tokenizer, Prompt("{text}"), max_new_tokens=TOKENS, temperature=TEMPERATURE, batch_size=64)
            for e in evaluators
        )
        pad = tokenizer.pad_token_id or 0
        self.read_now, self.read_start = (
            AnswerLogits(e, p, pad_id=pad, temperature=TEMPERATURE)
            for e, p in zip(evaluators, (self.parameters, evaluators[1].parameters), strict=True)
        )
        self.read_plainly = AnswerLogits(evaluators[1], evaluators[1].parameters, pad_id=pad)  # temperature 1


def held_out_answers(policy: Generation, draws: range) -> tuple[list[list[str]], list[TokenAnswer]]:
    """Texts as `[draw][prompt]`, and all answers as tokens."""
    rows = [{"text": text} for text in HELD_OUT]
    prompts = policy.prompt_ids(rows)
    texts, tokens = [], []
    for draw in draws:
        (answers,) = policy.answers(rows, [CENTRE], noise_seed=derive_seed(7, "held out", draw))
        texts.append([str(answer.completion) for answer in answers])
        tokens += [TokenAnswer(tuple(ids), tuple(a.completion_ids)) for ids, a in zip(prompts, answers, strict=True)]
    return texts, tokens


def perplexity(reader: AnswerLogits, answers: Sequence[TokenAnswer]) -> float:
    value = math.exp(-chosen(reader.log_probabilities(answers), answers).mean().item())
    reader.forget()
    return value


def of_the_start(path: str) -> dict[str, Any]:
    """Answers of the starting model, and their figures: what all cells are compared with."""
    models = Models(path, output_bias=True)
    texts, answers = held_out_answers(models.start, range(START_DRAWS))
    groups = [texts[i : i + DRAWS] for i in range(0, START_DRAWS, DRAWS)]
    return {
        "texts": texts,
        "perplexity": perplexity(models.read_plainly, answers),
        "distinct_2": statistics.fmean(distinct_2(text for draw in group for text in draw) for group in groups),
    }


def measure(models: Models, preference: str, start: dict[str, Any]) -> dict[str, Any]:
    """Of the model as it is: judged without noise, ties as halves, on noise that the starting model's answers did not have."""
    texts, answers = held_out_answers(models.now, range(START_DRAWS, START_DRAWS + DRAWS))
    judge = RewardJudge(PREFERENCES[preference])
    wins: list[float] = []
    for draw, mine in enumerate(texts):
        for other in range(draw, START_DRAWS, DRAWS):
            theirs = start["texts"][other]
            wins += [0.5 + 0.5 * choice.preference for choice in judge(list(HELD_OUT), mine, theirs)]
    now, before = models.read_now.log_probabilities(answers), models.read_start.log_probabilities(answers)
    models.read_now.forget()
    models.read_start.forget()
    return {
        "win_rate": statistics.fmean(wins),
        "perplexity": perplexity(models.read_plainly, answers) / start["perplexity"],
        "distinct_2": distinct_2(text for draw in texts for text in draw) / start["distinct_2"],
        "kl": divergence(now, before).mean().item(),
        "example": texts[0][0],
    }


class Rater(RewardJudge):
    """The simulated person, who counts what was asked of them."""

    def __init__(self, preference: str, seed: int) -> None:
        super().__init__(PREFERENCES[preference], noise=NOISE, ties=TIES, seed=seed)
        self.verdicts = self.decided = 0

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], **columns: Any
    ) -> list[Choice]:
        choices = super().__call__(prompts, first, second, **columns)
        self.verdicts += len(choices)
        self.decided += sum(choice in (Choice.FIRST, Choice.SECOND) for choice in choices)
        return choices


def batches(seed: int, size: int) -> Iterator[list[dict[str, str]]]:
    """Tuning prompts without end, in an order of the seed's own."""
    shuffled: list[str] = []
    generator = random.Random(seed)
    while True:
        while len(shuffled) < size:
            shuffled += generator.sample(TUNING, len(TUNING))
        yield [{"text": text} for text in shuffled[:size]]
        del shuffled[:size]


def run_cell(path: str, name: str, preference: str, seed: int, start: dict[str, Any]) -> dict[str, Any]:
    """One run, measured on the way."""
    torch.set_num_threads(1)
    method = METHODS[name]
    began = time.perf_counter()
    models = Models(path, method.output_bias)
    rater = Rater(preference, seed)
    mezo = MeZO(
        models.parameters.items(), lr=method.lr, epsilon=method.epsilon, n_spsa=method.n_spsa, update="normalized", seed=seed,
        comparison=method.comparison,
    )  # fmt: skip
    replay = PreferenceReplay(
        models.read_now, models.read_start, brake=method.brake, batch_size=method.pairs_per_step, seed=seed
    )
    objective = JudgeObjective(models.now, rater)
    stream = batches(seed, method.prompts)
    reached: dict[str, Any] = {}
    rounds = 0
    for goal in VERDICTS:
        while rater.verdicts < goal:
            rows, rounds = next(stream)[: goal - rater.verdicts], rounds + 1
            if not method.replay:
                probe = mezo.ask()
                asked = objective.ask(rows, probe.points, derive_seed(seed, "noise", rounds))
                mezo.tell(probe.id, asked.answers)
                mezo.step()
                continue
            replay.add(judged(models.now, rater, rows, derive_seed(seed, "noise", rounds)))
            while replay.pairs and mezo.steps < rater.verdicts // method.verdicts_per_step:
                replay.step(mezo)
        reached[str(goal)] = measure(models, preference, start) | {
            "decided": rater.decided / rater.verdicts, "steps": mezo.steps
        }  # fmt: skip
    return {
        "method": name, "preference": preference, "seed": seed, "reached": reached, "machine": f"{machine()}, one thread per run",
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def judged(policy: Generation, rater: Rater, rows: Sequence[dict[str, str]], noise: int) -> list[Preference]:
    """Verdicts on two answers of the current model to each prompt. Identical ones are shown to nobody."""
    prompts = policy.prompt_ids(rows)
    first, second = (policy.answers(rows, [CENTRE], noise_seed=derive_seed(noise, side))[0] for side in (0, 1))
    shown = [i for i in range(len(rows)) if first[i].completion != second[i].completion]
    choices = rater(
        [rows[i]["text"] for i in shown], [first[i].completion for i in shown], [second[i].completion for i in shown]
    )
    pairs = []
    for i, choice in zip(shown, choices, strict=True):
        a, b = (TokenAnswer(tuple(prompts[i]), tuple(side[i].completion_ids)) for side in (first, second))
        if choice in (Choice.FIRST, Choice.SECOND):
            pairs.append(Preference(a, b) if choice is Choice.FIRST else Preference(b, a))
    return pairs


def path_of(name: str, preference: str, seed: int) -> Path:
    return CELLS / f"{name}-{preference.replace(' ', '_')}-{seed}.json"


def run_all(path: str, jobs: int) -> None:
    """Runs missing cells, `jobs` at a time."""
    CELLS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    kept = CELLS / "start.json"
    if not kept.exists():
        kept.write_text(json.dumps(of_the_start(path), indent=1) + "\n")
    start = json.loads(kept.read_text())
    todo = [(m, p, s) for s in SEEDS for m in METHODS for p in PREFERENCES if not path_of(m, p, s).exists()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(run_cell, path, *cell, start): cell for cell in todo}
        for done in as_completed(runs):
            path_of(*runs[done]).write_text(json.dumps(done.result(), indent=1) + "\n")
            figures = done.result()["reached"]["200"]
            print(
                f"{time.strftime('%H:%M:%S')}  {' · '.join(map(str, runs[done]))}: at 200 verdicts win rate"
                f" {figures['win_rate']:.2f}, perplexity ×{figures['perplexity']:.2f}, distinct-2 ×{figures['distinct_2']:.2f}",
                flush=True,
            )


def found(name: str, preference: str | None = None) -> list[dict[str, Any]]:
    """Cells that are done."""
    paths = [path_of(name, p, s) for p in ([preference] if preference else PREFERENCES) for s in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def mean(runs: Sequence[dict[str, Any]], verdicts: int, figure: str) -> float:
    return statistics.fmean(run["reached"][str(verdicts)][figure] for run in runs)


def row(runs: Sequence[dict[str, Any]], verdicts: int) -> str:
    """Mean ± standard error over runs of the win rate, then the means of what it cost."""
    wins = [run["reached"][str(verdicts)]["win_rate"] for run in runs]
    error = f" ± {statistics.stdev(wins) / math.sqrt(len(wins)):.3f}" if len(wins) > 1 else ""
    costs = (f"{mean(runs, verdicts, figure):.3f}" for figure in ("perplexity", "distinct_2", "kl"))
    held = sum(
        all(abs(run["reached"][str(verdicts)][f] - 1) <= BOUND for f in ("perplexity", "distinct_2")) for run in runs
    )
    decided = mean(runs, verdicts, "decided")
    return f"{statistics.fmean(wins):.3f}{error} | {' | '.join(costs)} | {held} of {len(runs)} | {decided:.0%}"


def report() -> str:
    """docs/human_efficiency.md, from the cells that are there."""
    start = json.loads((CELLS / "start.json").read_text())
    lines = [
        "# What a click is worth",
        "",
        "Written by `benchmarks/human_efficiency.py --report` from the cells in `benchmarks/results/human_efficiency/`.",
        "",
        *INTRODUCTION.format(
            noise=NOISE, ties=TIES, tokens=TOKENS, temperature=TEMPERATURE, tuning=len(TUNING), held_out=len(HELD_OUT),
            draws=DRAWS, rivals=START_DRAWS // DRAWS, perplexity=start["perplexity"], distinct=start["distinct_2"],
        ).splitlines(),
        "",
        "![Win rate after 50, 100, 200 and 500 verdicts, and the perplexity that it costs](human_efficiency.png)",
        "",
        "## All preferences",
        "",
        "Means over the runs; the win rate with its standard error. *Within the bound*: runs whose perplexity and distinct-2 "
        f"are both within {BOUND:.0%} of the start. *Decided*: verdicts that were not ties.",
        "",
        "| method | verdicts | win rate | perplexity × | distinct-2 × | KL, nats per token | within the bound | decided |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, method in METHODS.items():
        if runs := found(name):
            lines += [f"| {method.label} | {v} | {row(runs, v)} |" for v in VERDICTS]
    lines += [
        "",
        "A mean within the bound does not mean that every run is, and a difference below two standard errors should not be read "
        "as one. The methods differ in several ways: replay is penalised for drifting, and stops; the verdicts alone do not."
        "",
        "",
        "## Each preference, after 200 verdicts",
        "",
        "| method | preference | win rate | perplexity × | distinct-2 × | KL, nats per token | within the bound | decided |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        for preference in PREFERENCES:
            if runs := found(name, preference):
                lines.append(f"| {method.label} | {preference} | {row(runs, 200)} |")
    lines += ["", *CHOICES.splitlines(), "", "## How it reads", ""]
    lines += ["The first held-out prompt (`" + HELD_OUT[0] + "`), seed 0, after 200 verdicts of the first method:", ""]
    lines.append(f"* *start*: {' '.join(start['texts'][0][0].split())}")
    for preference in PREFERENCES:
        for run in found(next(iter(METHODS)), preference)[:1]:
            lines.append(f"* *{preference}*: {' '.join(run['reached']['200']['example'].split())}")
    runs = [run for name in METHODS for run in found(name)]
    minutes = sum(run["seconds"] for run in runs) / 60
    lines += [
        "",
        f"Machine: {runs[0]['machine']}; {len(runs)} runs, {minutes:.0f} minutes in all, beside other work.",
        "",
    ]
    return "\n".join(lines)


INTRODUCTION = """\
A simulated person has one hidden preference, and answers pairs: two texts to one prompt, which is better? {noise:.0%} of the
verdicts are flipped and {ties:.0%} are called ties, besides those where the texts are equally good. *One verdict is one pair
shown*; identical pairs are shown to nobody and cost nothing. Three preferences: mentions friendship (words of friendship, three
at most), shorter first sentence (words up to the first full stop, exclamation or question mark), more dialogue (words in
quotation marks, fifteen at most).

The model tells stories (stories260K: 260,032 parameters, TinyStories), {tokens} tokens at temperature {temperature}; {tuning}
prompts to tune on. The *win rate* is the blind one against the starting model, judged without noise and with ties as halves, on
{held_out} held-out prompts: {draws} answers of the tuned model to each, every one against {rivals} of the starting model's, drawn
independently of each other. *Perplexity* is that of the answers under the starting model, and *distinct-2* the share of different
word pairs among all of them, each as a multiple of the starting model's own ({perplexity:.2f} and {distinct:.2f}).

* *replay of verdicts, output bias*: one bias per token on the output embedding is tuned (`zorl.output_bias`). A pair is two
  answers of the current model. After every fourth verdict MeZO takes a step on some of the verdicts so far. It asks not what the
  person said of two points, but how much likelier each point makes the texts that were preferred (`zorl.preference_replay`:
  forward passes alone, no reward model), with a brake on the divergence from the starting model.
* *verdicts alone, output bias*: the plain comparison estimator on the same parameters. A pair is the two sides of a direction
  with the same sampling noise, and the verdicts on it, and nothing else, are the loss difference of one step. No brake.
* The others change one thing each: no brake; the sign or the shrunk logit of the vote share; all parameters."""

CHOICES = """\
## What was chosen, on what, and what lost

Settings were chosen on two seeds (101, 102), three preferences and 12 development prompts that are in neither the tuning nor
the held-out list; the five seeds and the held-out prompts were used for the tables above alone. Most of it was done in a
faster program, not kept, that runs all six at once and makes SPSA's projections from exact gradients; the last choice was
checked in this one at a learning rate of 0.45, and then lowered to 0.4, which was not run there, to stay clear of the bound.
What is said below without a row above comes from that program. The preferences were
written down first and not changed. The temperature was lowered from 1.0 to 0.8 and the length raised from 48
to 64 tokens after the first runs, because there most pairs were ties for friendship and for dialogue.

* *Parameters.* Forward passes pay for each number that is tuned with noise in the direction, and random movement costs the text
  least in the output bias. Biases and scales inside the layers, norm gains and steering vectors on the residual stream could
  do as much or more with an exact gradient, and did less with the directions that 200 verdicts pay for.
* *These preferences suit it.* Words of friendship, full stops and quotation marks are tokens. A preference about what is
  said, rather than in which words, will need more than a bias per token; replay works on any parameters, at the price of whole
  forwards.
* *Per-coordinate steps* (Adam, exact gradients) on the same pairs won as often and cost far more: they lost to plain steps
  along the directions.
* *The brake.* Without it the win rate is higher and the text worse (a row above). Twice as much holds too hard, and so does a
  larger β.
* *Directions and pairs per step.* 16 or 32 of either: no order that two seeds could show.
* *What is shown.* Two answers of the current model, or the sides of a direction with shared noise, replayed alike: no order
  that two seeds could show.
* *Verdicts alone.* A larger rate wins more often and costs more; 0.12 ends near the bound after 200 verdicts. One
  prompt per direction is no better than four.
* *Share, sign or shrunk logit* of four verdicts (`zorl.comparisons`): rows above. The plain share is the default, where none
  is clearly better."""


def plot(target: Path) -> None:
    """Win rates, and what they cost, by verdicts."""
    from matplotlib.figure import Figure

    colours = ("#1f6f8b", "#c2571a")  # the ablations are in the table
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, method), colour in zip(METHODS.items(), colours, strict=False):
        if not (runs := found(name)):
            continue
        wins = [mean(runs, v, "win_rate") for v in VERDICTS]
        left.plot((0, *VERDICTS), (0.5, *wins), "o-", color=colour, linewidth=2, label=method.label)
        for run in runs:
            left.plot(
                VERDICTS, [run["reached"][str(v)]["win_rate"] for v in VERDICTS], color=colour, alpha=0.15, linewidth=1
            )
        right.plot(
            (1, *(mean(runs, v, "perplexity") for v in VERDICTS)), (0.5, *wins), "o-", color=colour, linewidth=2,
            label=method.label,
        )  # fmt: skip
        for v, win in zip(VERDICTS, wins, strict=True):
            right.annotate(
                str(v), (mean(runs, v, "perplexity"), win), textcoords="offset points", xytext=(6, -10), fontsize=8
            )
    left.axhline(0.75, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="verdicts", ylabel="blind win rate against the start", ylim=(0.4, 1.0), xlim=(0, None))
    right.axvspan(1 - BOUND, 1 + BOUND, color="black", alpha=0.06, label=f"within {BOUND:.0%} of the start")
    right.axhline(0.75, color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="perplexity under the start, × its own", ylim=(0.4, 1.0))
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model that tells stories")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each (default: 1)")
    parser.add_argument("--report", action="store_true", help="only write docs/human_efficiency.md and .png")
    options = parser.parse_args()
    if not options.report and not options.model:
        parser.error("--model is needed to run; --report alone writes the report")
    if not options.report:
        run_all(options.model, options.jobs)
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "human_efficiency.md").write_text(report(), encoding="utf-8")
    plot(docs / "human_efficiency.png")


if __name__ == "__main__":
    main()
