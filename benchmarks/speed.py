"""What a step costs, in units of the two forward passes that it needs.

    python benchmarks/speed.py                     # every batch; about 15 minutes on 2 cores
    python benchmarks/speed.py --quick             # batch 8x64 and generation alone, in under a minute
    python benchmarks/speed.py --json speed.json   # the same rows for machines
    python benchmarks/speed.py --write             # docs/speed.md, docs/speed.png and benchmarks/results/speed.json

The model has the shape of OPT-125M and random weights, in float32. All cases read the last position of a batch of tokens. They
take turns: a round runs each once, and a ratio is to the plain forwards right before and after, so that a machine that slows down
slows all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, spread
from torch import Tensor
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from zorl import MeZO
from zorl.apps.allocator import keep_freed_memory
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


def make_model(**shape: int) -> Any:
    """OPT-125M, or another of its family."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(dropout=0.0, **shape)).eval()
    model.generation_config.eos_token_id = None  # every text is as long as asked for
    return model


class Cases:
    """One step of each method, on one batch."""

    def __init__(self, model: Any, tokens: Tensor, *, generate: bool) -> None:
        self.model, self.tokens, self.generate = model, tokens, generate
        self.labels = torch.arange(len(tokens), device=tokens.device) % 2
        self.label_rows = LABEL_ROWS.to(tokens.device)
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
        if logits.shape[1] != len(self.label_rows):
            logits = logits[:, self.label_rows]
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
                z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
                p.data = p.data + scale * EPSILON * z

        perturb(1.0)
        plus = self.forward(self.model)[0]
        perturb(-2.0)
        minus = self.forward(self.model)[0]
        perturb(1.0)
        torch.manual_seed(1)
        projected = (plus - minus) / (2 * EPSILON)
        for p in parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
            p.data = p.data - LR * projected * z

    def _step(self, mezo: MeZO, evaluator: Scratch | Twin) -> None:
        probe = mezo.ask()
        rows = None if self.generate else self.label_rows
        forward = lambda copies: self.forward(evaluator.module, copies)  # noqa: E731
        mezo.tell(probe.id, Scores.of_losses(evaluator.evaluate_all(probe.points, forward, head_rows=rows)))
        mezo.step()

    def scratch_step(self) -> None:
        self._step(self.scratch, self.by_module)

    def twin_n1(self) -> None:
        self._step(self.twin, self.stacked)

    def twin_n4(self) -> None:
        self._step(self.twin4, self.stacked)

    def adam_step(self, tokens: Tensor | None = None) -> None:
        tokens = self.tokens if tokens is None else tokens
        if self.adam is None:
            self.adam = torch.optim.AdamW(self.model.parameters(), lr=LR)
        logits = self.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        F.cross_entropy(logits[:, self.label_rows].float(), self.labels[: len(tokens)]).backward()
        self.adam.step()
        self.adam.zero_grad()

    def methods(self) -> dict[str, Callable[[], None]]:
        """In the order of what they leave behind: Adam's moments stay for good."""
        found = {
            "scratch": self.scratch_step,
            "twin_n1": self.twin_n1,
            "twin_n4": self.twin_n4,
            "published": self.published,
        }
        return found if self.generate else {**found, "adam": self.adam_step}


def measure(model: Any, name: str, tokens: Tensor, rounds: int, *, generate: bool, quick: bool) -> list[dict[str, Any]]:
    """Rows of one batch: the cases take turns between plain forwards, and each is compared with those right before and after.

    Args:
        quick: only the cases that have a target take turns; of generation there are no others, and the rest run once.
    """
    cases = Cases(model, tokens, generate=generate)
    methods = cases.methods()
    # What replaces the weights, or leaves moments behind, would count for the others' memory: it comes after them.
    last = {case: methods.pop(case) for case in list(methods) if case in ("published", "adam")}
    if quick:
        last = {**{case: methods.pop(case) for case in list(methods) if (case, name) not in TARGETS}, **last}
    seconds: dict[str, list[float]] = {case: [] for case in (*methods, *({} if quick and generate else last))}
    if not quick:
        for work in (cases.two_forwards, *methods.values()):
            work()  # allocates
    plain = [timed(cases.two_forwards)]
    for _ in range(rounds):
        found = {case: timed(method) for case, method in methods.items()}
        plain.append(timed(cases.two_forwards))
        for case, value in found.items():
            seconds[case].append(2 * value / (plain[-2] + plain[-1]))
    peaks = {} if quick and generate else memory_of(cases, methods)
    for case, method in last.items():
        if case in seconds:
            if case == "adam":
                cases.adam_step(tokens[:1, :4])  # makes room for its moments
            for _ in range(1 if quick else rounds):
                before = statistics.median(plain) if quick else timed(cases.two_forwards)
                with peak_memory(tokens.device) as peak:
                    seconds[case].append(timed(method) / before)
                peaks[case] = peak.megabytes
    base = statistics.median(plain)
    rows = [{"case": "forwards", "batch": name, "ratio": 1.0, "spread": [1.0, 1.0], "seconds": round(base, 4),
             "peak_memory_mb": whole(peaks.get("scratch_inference"))}]  # fmt: skip
    for case in CASES:
        if case in seconds:
            per = 4 if case == "twin_n4" else 1
            ordered = sorted(value / per for value in seconds[case])
            rows.append({"case": case, "batch": name, "ratio": round(statistics.median(ordered), 3),
                         "spread": [round(ordered[0], 3), round(ordered[-1], 3)],
                         "seconds": round(statistics.median(ordered) * base, 4), "peak_memory_mb": whole(peaks.get(case)),
                         "inference_mb": whole(peaks.get(f"{case}_inference"))})  # fmt: skip
    return rows


def memory_of(cases: Cases, methods: dict[str, Callable[[], None]]) -> dict[str, float | None]:
    """Megabytes while each method makes a step, and while plain inference has as many rows in a forward.

    They are of the whole process, or of what torch has allocated on a GPU.
    """
    found: dict[str, float | None] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        with peak_memory(cases.tokens.device) as peak:
            work()
        found[name] = peak.megabytes

    copies = {"scratch": 1, "twin_n1": 2, "twin_n4": 8}
    for case, method in methods.items():
        if case in copies:
            note(f"{case}_inference", partial(cases.forward, cases.model, copies[case]))
        note(case, method)
    return found


def whole(megabytes: float | None) -> int | None:
    return None if megabytes is None else round(megabytes)


def timed(work: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """A GPU goes on working after the call that asked it to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def compiled(model: Any, tokens: Tensor, rounds: int) -> dict[str, Any]:
    """What torch.compile makes of a plain forward: all that it could do for a step's evaluations, at best."""
    cases = Cases(model, tokens, generate=False)
    fast = torch.compile(model)
    once = timed(lambda: cases.forward(fast))
    cases.forward(fast)
    ratios = sorted(timed(lambda: cases.forward(fast)) / timed(lambda: cases.forward(model)) for _ in range(3 * rounds))
    return {"case": "compiled", "batch": f"{len(tokens)}x{tokens.shape[1]}", "ratio": round(statistics.median(ratios), 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)], "seconds_to_compile": round(once, 1)}  # fmt: skip


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
        f"medians and ranges of {rounds} rounds in which the cases take turns. A batch of 4x32 has 4 "
        "rows of 32 tokens. A step includes everything: both evaluations, the update of all 125M parameters, and for n = 4 all "
        "eight points; that row is one direction's share. *Target* is the project's own goal; a larger ratio misses "
        "it.",
        "",
        table(rows),
        "",
        "![ratios to two forwards](speed.png)",
        "",
    ]
    lines += chosen()
    compile_row = next((row for row in rows if row["case"] == "compiled"), None)
    if compile_row is not None:
        low, high = compile_row["spread"]
        lines += ["## torch.compile", "",
                  f"A plain forward of {compile_row['batch']} takes {compile_row['ratio']:.2f} times as long compiled as it does "
                  f"otherwise ({low:.2f} to {high:.2f}), after {compile_row['seconds_to_compile']:.0f} s of compiling, and every "
                  "other shape of a batch is compiled anew. That is the most it could do for an evaluation, so zorl does not "
                  "compile the policy.", ""]  # fmt: skip
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
    folder = ROOT / "benchmarks" / "results" / "efficiency"
    lines = [
        "## The default, and why",
        "",
        'Directions of rank one (`distribution="rank1"`), all points of a step in one forward (`evaluation="auto"`).',
    ]
    rows = []
    for task in ("sst2", "trec"):
        found = [
            [
                json.loads(path.read_text())["looks"][-1]["accuracy"]
                for path in folder.glob(f"{task}-accuracy-{kind}-*.json")
            ]
            for kind in ("default", "dense")
        ]
        if all(len(values) > 1 for values in found):
            figures = " | ".join(map(spread, found))
            rows.append(f"| {task.upper().replace('SST2', 'SST-2')} | {figures} |")
    if rows:
        lines += [
            "A faster step that learns less is not faster, so here is what both kinds of direction learn in as many forwards: "
            "mean ± standard deviation over the seeds of the test accuracy, from [efficiency.md](efficiency.md).",
            "",
            "| task | rank one | dense ±1 |",
            "|---|---|---|",
            *rows,
        ]
    return [
        *lines,
        "",
        "Rank four is offered and was not compared. Where a model does something that cannot be stacked, it says so, and "
        '`evaluation="scratch"` evaluates one point at a time along any direction.',
        "",
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row["batch"] for row in rows if row["case"] in CASES))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(CASES)
    for i, (case, label) in enumerate(CASES.items()):
        mine = [(batches.index(row["batch"]), row) for row in rows if row["case"] == case]
        x, y = [at + (i - 2) * width for at, _ in mine], [row["ratio"] for _, row in mine]
        error = [
            [row["ratio"] - row["spread"][0] for _, row in mine],
            [row["spread"][1] - row["ratio"] for _, row in mine],
        ]
        axes.bar(x, y, width, yerr=error, label=label, error_kw={"linewidth": 0.8})
    axes.axhline(1.0, color="#666666", linestyle="--", linewidth=1)
    axes.set(xticks=range(len(batches)), xticklabels=batches, ylabel="time, two forwards = 1", yscale="log")
    marks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_title("A step in units of the two forward passes it needs")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 8x64 and generation alone, fewer rounds")
    parser.add_argument("--rounds", type=int, help="rounds a batch (default: 5; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--write", action="store_true", help="write docs/speed.md, its plot and the results")
    parser.add_argument("--report", action="store_true", help="only write docs/speed.md again, from the results")
    options = parser.parse_args()
    if options.report:
        kept = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
        (ROOT / "docs" / "speed.md").write_text(report(kept["rows"], kept["machine"], 3), encoding="utf-8")
        return
    keep_freed_memory()  # as the zorl command does; for all cases alike
    model = make_model()
    warm = Cases(model, torch.full((1, 4), 7), generate=False)
    for work in (warm.scratch_step, warm.twin_n1):
        work()  # compiles, and loads what is loaded lazily
    del warm
    rounds = options.rounds or (3 if options.quick else 5)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size, length in ((8, 64),) if options.quick else BATCHES:
        tokens = torch.randint(5, 50_000, (size, length), generator=generator)
        rows += measure(model, f"{size}x{length}", tokens, rounds, generate=False, quick=options.quick)
        print(table(rows[-len(CASES) - 1 :]), flush=True)
    prompts = torch.randint(5, 50_000, (8, 16), generator=generator)
    rows += measure(model, "generate", prompts, 1 if options.quick else 3, generate=True, quick=options.quick)
    if not options.quick:
        rows.append(replay(steps=1000, one_by_one=50))
        rows.append(compiled(model, torch.randint(5, 50_000, (8, 64), generator=generator), rounds))
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
