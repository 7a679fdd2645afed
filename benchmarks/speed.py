"""What a step costs, in units of the two forward passes that it needs.

    python benchmarks/speed.py                     # every batch; about 15 minutes on 2 cores
    python benchmarks/speed.py --quick             # batch 8x64 and generation alone, in under a minute
    python benchmarks/speed.py --json speed.json   # the same rows for machines
    python benchmarks/speed.py --write             # docs/speed.md, docs/speed.png and benchmarks/results/speed.json

The model has the shape of OPT-125M and random weights, in float32. All cases read the last position of a batch of tokens. They
take turns: a round runs each once, and a ratio is to the two plain forwards of its own round, so that a machine that slows down
slows all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from zorl import MeZO
from zorl.apps.memory import peak_memory
from zorl.directions import Step
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Scores
from zorl.twin import Twin

ROOT = Path(__file__).resolve().parent.parent
BATCHES = ((4, 32), (8, 64), (16, 64), (16, 128))
NEW_TOKENS = 32
LABEL_ROWS = torch.tensor([1000, 2000])  # the words of two labels: rows of the vocabulary
EPSILON, LR = 1e-3, 1e-6
CASES = {
    "published": "published MeZO",
    "scratch": "zorl, scratch",
    "twin_n1": "zorl, twin, n = 1",
    "twin_n4": "zorl, twin, n = 4, a direction",
    "adam": "Adam, backpropagation",
}
TARGETS = {("scratch", "8x64"): 1.10, ("scratch", "4x32"): 1.20, ("twin_n1", "8x64"): 1.0, ("twin_n1", "16x64"): 1.0,
           ("twin_n1", "generate"): 0.65}  # fmt: skip


def make_model() -> Any:
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(dropout=0.0)).eval()
    model.generation_config.eos_token_id = None  # every text is as long as asked for
    return model


class Cases:
    """One step of each method, on one batch."""

    def __init__(self, model: Any, tokens: Tensor, *, generate: bool) -> None:
        self.model, self.tokens, self.generate = model, tokens, generate
        self.labels = torch.arange(len(tokens)) % 2
        named = list(model.named_parameters())
        self.scratch = MeZO(named, lr=LR, epsilon=EPSILON)
        self.twin = MeZO(named, lr=LR, epsilon=EPSILON, distribution="rank1")
        self.twin4 = MeZO(named, lr=LR, epsilon=EPSILON, distribution="rank1", n_spsa=4)
        self.by_module = Scratch(model, self.scratch.parameters)
        self.stacked = Twin(model, self.twin.parameters)
        self.adam: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def forward(self, model: Any, copies: int = 1) -> list[float]:
        """A loss for each copy of the batch: of the last position's label words, or of the text that is generated."""
        tokens = self.tokens.repeat(copies, 1)
        mask = torch.ones_like(tokens)
        if self.generate:
            text = model.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1
            )
            return [(part[:, -NEW_TOKENS:] % 7).float().mean().item() for part in text.chunk(copies)]
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1]
        if logits.shape[1] != len(LABEL_ROWS):
            logits = logits[:, LABEL_ROWS]
        return [F.cross_entropy(part.float(), self.labels).item() for part in logits.chunk(copies)]

    def two_forwards(self) -> None:
        self.forward(self.model)
        self.forward(self.model)

    @torch.no_grad()
    def published(self) -> None:
        """MeZO's Algorithm 1 as it was published: z is drawn four times, and every change makes a new tensor."""
        parameters = list(self.model.parameters())

        def perturb(scale: float) -> None:
            torch.manual_seed(1)
            for p in parameters:
                z = torch.normal(mean=0.0, std=1.0, size=p.shape)
                p.data = p.data + scale * EPSILON * z

        perturb(1.0)
        plus = self.forward(self.model)[0]
        perturb(-2.0)
        minus = self.forward(self.model)[0]
        perturb(1.0)
        torch.manual_seed(1)
        projected = (plus - minus) / (2 * EPSILON)
        for p in parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data = p.data - LR * projected * z

    def _step(self, mezo: MeZO, evaluator: Scratch | Twin) -> None:
        probe = mezo.ask()
        rows = None if self.generate else LABEL_ROWS
        forward = lambda copies: self.forward(evaluator.module, copies)  # noqa: E731
        mezo.tell(probe.id, Scores.of_losses(evaluator.evaluate_all(probe.points, forward, head_rows=rows)))
        mezo.step()

    def scratch_step(self) -> None:
        self._step(self.scratch, self.by_module)

    def twin_n1(self) -> None:
        self._step(self.twin, self.stacked)

    def twin_n4(self) -> None:
        self._step(self.twin4, self.stacked)

    def adam_step(self) -> None:
        if self.adam is None:
            self.adam = torch.optim.AdamW(self.model.parameters(), lr=LR)
        logits = self.model(
            input_ids=self.tokens, attention_mask=torch.ones_like(self.tokens), logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        F.cross_entropy(logits[:, LABEL_ROWS].float(), self.labels).backward()
        self.adam.step()
        self.adam.zero_grad()

    def methods(self) -> dict[str, Callable[[], None]]:
        found = {
            "published": self.published,
            "scratch": self.scratch_step,
            "twin_n1": self.twin_n1,
            "twin_n4": self.twin_n4,
        }
        return found if self.generate else {**found, "adam": self.adam_step}


def measure(name: str, tokens: Tensor, rounds: int, *, generate: bool, quick: bool) -> list[dict[str, Any]]:
    """Rows of one batch. The published step writes new tensors, so it has a model to itself.

    Args:
        quick: no round is given away to warm caches up, and of generation only the case that has a target is run.
    """
    cases = Cases(make_model(), tokens, generate=generate)
    theirs = Cases(make_model(), tokens, generate=generate)
    methods = {**cases.methods(), "published": theirs.published}
    if quick and generate:
        methods = {"twin_n1": cases.twin_n1}
    seconds: dict[str, list[float]] = {case: [] for case in methods}
    plain: list[float] = []
    adam = methods.pop("adam", None)
    for i in range(rounds if quick else rounds + 1):
        once = timed(cases.two_forwards)
        found = {case: timed(method) for case, method in methods.items()}
        again = timed(cases.two_forwards)
        if i or quick:  # the first allocates
            plain.append((once + again) / 2)
            for case, value in found.items():
                seconds[case].append(value / plain[-1])
    if adam is not None:
        adam()
        for _ in range(rounds):
            before, value = timed(cases.two_forwards), timed(adam)
            seconds["adam"].append(value / before)
    methods.clear()
    del cases, theirs, adam
    peaks = {} if quick and generate else memory_of(tokens, generate=generate)
    base = statistics.median(plain)
    rows = [{"case": "forwards", "batch": name, "ratio": 1.0, "spread": [1.0, 1.0], "seconds": round(base, 4),
             "peak_memory_mb": peaks.get("forwards")}]  # fmt: skip
    for case, values in seconds.items():
        per = 4 if case == "twin_n4" else 1
        ordered = sorted(value / per for value in values)
        rows.append({"case": case, "batch": name, "ratio": round(statistics.median(ordered), 3),
                     "spread": [round(ordered[0], 3), round(ordered[-1], 3)],
                     "seconds": round(statistics.median(ordered) * base, 4), "peak_memory_mb": peaks.get(case),
                     "inference_mb": peaks.get(f"{case}_inference")})  # fmt: skip
    return rows


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_of(tokens: Tensor, *, generate: bool) -> dict[str, float | None]:
    """Megabytes of the whole process while each method makes a step, and while plain inference has as many rows in a forward.

    With one model, the two methods that leave the most behind last.
    """
    cases = Cases(make_model(), tokens, generate=generate)
    methods = cases.methods()
    found: dict[str, float | None] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        work()  # allocates what stays
        with peak_memory() as peak:
            work()
        found[name] = None if peak.megabytes is None else round(peak.megabytes)

    note("forwards", cases.two_forwards)
    for case, copies in (("scratch", 1), ("twin_n1", 2), ("twin_n4", 8)):
        note(f"{case}_inference", partial(cases.forward, cases.model, copies))
        note(case, methods[case])
    for case in [case for case in ("published", "adam") if case in methods]:
        note(case, methods[case])
    return found


def replay(*, steps: int, one_by_one: int) -> dict[str, Any]:
    """20,000 steps onto the base weights: block by block, and step by step; both measured on fewer and scaled up."""
    rows: dict[str, Any] = {"case": "replay", "batch": "20000 steps"}
    for distribution in ("rank1", "rademacher"):
        parameters = ParameterSet(make_model().named_parameters())
        log = [Step(i, 1e-7 * (-1) ** (i // 2)) for i in range(steps)]
        parameters.add(log[:2], distribution)  # type: ignore[arg-type]
        start = parameters.sha256()
        whole = timed(lambda: parameters.add(log, distribution)) / steps  # type: ignore[arg-type] # noqa: B023
        single = timed(lambda: [parameters.add([step], distribution) for step in log[:one_by_one]]) / one_by_one  # type: ignore[arg-type] # noqa: B023
        a, b = ParameterSet(make_model().named_parameters()), ParameterSet(make_model().named_parameters())
        a.add(log[:8], distribution)  # type: ignore[arg-type]
        for step in log[:8]:
            b.add([step], distribution)  # type: ignore[arg-type]
        if a.sha256() != b.sha256() or a.sha256() == start:
            raise RuntimeError("a replay by blocks has other bits than one by steps")
        rows[distribution] = {"seconds": round(whole * 20_000, 1), "seconds_step_by_step": round(single * 20_000, 1),
                              "ratio": round(single / whole, 2), "measured_steps": [steps, one_by_one]}  # fmt: skip
    return rows


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| batch | case | ratio to two forwards | range | target | memory, MB | inference with as many rows, MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        if row["case"] in CASES:
            target = TARGETS.get((row["case"], row["batch"]))
            memory, inference = (f"{row.get(k) or '':}" for k in ("peak_memory_mb", "inference_mb"))
            low, high = row["spread"]
            lines.append(
                f"| {row['batch']} | {CASES[row['case']]} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | "
                f"{'' if target is None else f'{target:.2f}'} | {memory} | {inference} |"
            )
        elif row["case"] == "forwards":
            lines.append(
                f"| {row['batch']} | two forwards | 1 ({row['seconds']:.3f} s) |  |  | {row['peak_memory_mb'] or ''} |  |"
            )
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], where: str, rounds: int) -> str:
    replayed = next((row for row in rows if row["case"] == "replay"), None)
    lines = [
        "# What a step costs",
        "",
        f"Written by `benchmarks/speed.py --write` ({where}). A model with the shape of OPT-125M and random weights, float32; "
        f"medians and ranges of {rounds} rounds in which the cases take turns. A step holds everything: both evaluations, the "
        "update of all 125M parameters, and for n = 4 all eight points; that row is a direction's share of it.",
        "",
        table(rows),
        "",
        "![ratios to two forwards](speed.png)",
        "",
    ]
    lines += chosen()
    if replayed is not None:
        many, few = replayed["rank1"]["measured_steps"]
        lines += ["## Replay of 20,000 steps", "",
                  "| direction | block by block, s | step by step, s | ratio |", "|---|---|---|---|"]  # fmt: skip
        for name in ("rank1", "rademacher"):
            row = replayed[name]
            lines.append(f"| {name} | {row['seconds']:.0f} | {row['seconds_step_by_step']:.0f} | {row['ratio']:.1f} |")
        lines += [
            "",
            f"Scaled up from {many} and {few} steps; both give the same bits.",
            "",
        ]
    return "\n".join(lines)


def chosen() -> list[str]:
    """Why rank one, both points in one forward, is the default: what a step costs above, and what it learns here."""
    cells = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results" / "real_f1").glob("*.json"))
    ]
    lines = [
        "## The default, and why",
        "",
        'Directions of rank one (`distribution="rank1"`), all points of a step in one forward (`evaluation="auto"`). A faster '
        "step that learns less is not faster, so here is what both kinds of direction learn in as many forwards: mean ± standard "
        "deviation of the test accuracy over the seeds of [results.md](results.md), from the same start.",
        "",
        "| task | objective | rank one | dense ±1 |",
        "|---|---|---|---|",
    ]
    for task in ("sst2", "trec"):
        for objective in ("macro_f1", "accuracy", "cross_entropy"):
            found = [
                [cell["accuracy"] for cell in cells if (cell["task"], cell["method"]) == (task, f"{kind}_{objective}")]
                for kind in ("zorl", "dense")
            ]
            if all(len(values) > 1 for values in found):
                figures = " | ".join(f"{statistics.fmean(v):.3f} ± {statistics.stdev(v):.3f}" for v in found)
                lines.append(f"| {task.upper().replace('SST2', 'SST-2')} | {objective.replace('_', ' ')} | {figures} |")
    return [
        *lines,
        "",
        "Rank four is offered and was not compared. Where a model does something that cannot be stacked, it says so, and "
        '`evaluation="scratch"` evaluates one point at a time along any direction.',
        "",
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row["batch"] for row in rows if row["case"] in CASES))
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    width = 0.8 / len(CASES)
    for i, (case, label) in enumerate(CASES.items()):
        mine = [(batches.index(row["batch"]), row) for row in rows if row["case"] == case]
        x, y = [at + (i - 2) * width for at, _ in mine], [row["ratio"] for _, row in mine]
        spread = [
            [row["ratio"] - row["spread"][0] for _, row in mine],
            [row["spread"][1] - row["ratio"] for _, row in mine],
        ]
        axes.bar(x, y, width, yerr=spread, label=label, error_kw={"linewidth": 0.8})
    axes.axhline(1.0, color="#666666", linestyle="--", linewidth=1)
    axes.set(xticks=range(len(batches)), xticklabels=batches, ylabel="time, two forwards = 1", yscale="log")
    marks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_title("A step in units of the two forward passes it needs")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 8x64 and generation alone, fewer rounds")
    parser.add_argument("--rounds", type=int, help="rounds a batch (default: 5; 1 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--write", action="store_true", help="write docs/speed.md, its plot and the results")
    options = parser.parse_args()
    for generate in (False, True):  # compiles, and loads what is loaded lazily
        for work in Cases(make_model(), torch.full((1, 4), 7), generate=generate).methods().values():
            work()
        if options.quick:
            break
    rounds = options.rounds or (1 if options.quick else 5)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size, length in ((8, 64),) if options.quick else BATCHES:
        tokens = torch.randint(5, 50_000, (size, length), generator=generator)
        rows += measure(f"{size}x{length}", tokens, rounds, generate=False, quick=options.quick)
        print(table(rows[-len(CASES) - 1 :]), flush=True)
    prompts = torch.randint(5, 50_000, (8, 16), generator=generator)
    rows += measure("generate", prompts, 1 if options.quick else 3, generate=True, quick=options.quick)
    if not options.quick:
        rows.append(replay(steps=1000, one_by_one=50))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.write:
        results = ROOT / "benchmarks" / "results" / "speed.json"
        results.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        (ROOT / "docs" / "speed.md").write_text(report(rows, machine(), rounds), encoding="utf-8")
        plot(rows, ROOT / "docs" / "speed.png")


if __name__ == "__main__":
    main()
