"""docs/results.md and its plot, from the cells of benchmarks/paper.py.

python benchmarks/paper_report.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import MASKED_MODEL
from paper import BATCH, BUDGET, CELLS, MAIN, REST, ROOT, SEEDS, SETTINGS, TEST_ROWS

from zorl.apps import compare_report
from zorl.apps.compare_methods import PUBLISHED_RATES
from zorl.baselines.fine_tuning import LEARNING_RATES

AGAINST = {
    "majority": "commonest label",
    "zero_shot": "zero-shot",
    "threshold": "threshold",
    "in_context": "in-context",
    "linear_probing": "linear probing",
    "label_head": "label head alone",
    "mezo_published": "published MeZO (cross entropy)",
    "fine_tuning": "fine-tuning",
}


def cells_of(name: str) -> list[dict[str, Any]]:
    """In the order of the methods above."""
    order = {method: i for i, method in enumerate((*MAIN, *REST))}
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (CELLS / name).glob("*.json")]
    return sorted(cells, key=lambda cell: (order.get(cell["method"], len(order)), cell["seed"]))


def report(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """docs/results.md: one table per setting, and what they say of the paper's claims."""
    machines = sorted({cell["machine"] for cells in found.values() for cell in cells})
    minutes = sum(cell.get("seconds", 0.0) for cells in found.values() for cell in cells) / 60
    lines = [
        "# Results",
        "",
        f"Written by `benchmarks/paper_report.py` from the cells in `benchmarks/results/paper/` ({'; '.join(machines)}). The "
        "masked model has 22.7M parameters (6 layers, width 384), the causal one 260,032: far smaller than the paper's, so "
        "compare rows here with each other and not with the paper. " + MASKED_MODEL,
        "",
        f"A run may spend {BUDGET} forwards of {BATCH} rows in learning; a backward pass counts as two. It chooses its "
        "settings and its best step by the first metric, on as many development rows as training rows; where it began is "
        f"among its candidates (for BBT that is the model behind a random prompt).{_older(found)} Figures are of at most "
        f"{TEST_ROWS} test rows, mean ± standard deviation over the seeds done ({', '.join(map(str, SEEDS))} are planned). Seeds "
        "draw the rows where a task has enough of them; SNLI's 96 are only divided differently, and FewGLUE's 32 are "
        "fixed, so there a seed is only the method's own. Forwards are all that were spent in learning. Where a method "
        "tries several learning rates, those of each are among them: fine-tuning and GRPO spend the budget on each rate, "
        "published MeZO a quarter of it on each and all of it on the best. Published MeZO tries the rates "
        f"{', '.join(f'{rate:g}' for rate in PUBLISHED_RATES)}, chosen for small models by what "
        "[efficiency.md](efficiency.md) found; the paper's own grids are 1e-07, 1e-06, 1e-05 for RoBERTa-large and 1e-07, "
        f"1e-06 for OPT. {_edges(found)}",
        "",
        "What else to bear in mind: zorl's defaults were found on these two models, with SST-2, TREC and RTE among the tasks "
        "([what_pays.md](what_pays.md)), so that SNLI, CB, WiC, BoolQ and COPA are the fairer tests of them. Momentum, which has "
        "no default learning rate, runs at 1e-4, untuned. BBT's reward is that of a batch, where its authors take the loss on "
        f"all training rows, and {BUDGET} forwards are few for it. “Linear probe, then MeZO” tunes a sequence-classification "
        "model, whose head reads the first token, through a pooler that this model has no weights for, of the text without a "
        "prompt; the other probes read the mask. Fine-tuning, BBT and GRPO hold two or three copies of what they tune in memory "
        "to keep their best, MeZO keeps its log. "
        f"{minutes:.0f} minutes of learning in all, partly beside other work: seconds are no benchmark. "
        "Learning curves at a larger budget are in [efficiency.md](efficiency.md).",
        "",
        *claims(found),
        "![test figures of every method, task by task](results.png)",
        "",
    ]
    for name, cells in found.items():
        setting = SETTINGS[name]
        metrics = metrics_of(cells)
        rows = compare_report.summary(cells, metrics)
        for row in rows:
            if any(map(is_older, (cell for cell in cells if cell["method"] == row["method"]))):
                row["title"] += " †"
        lines += [f"## {setting.title}", "", *([setting.note, ""] if setting.note else [])]
        lines += [compare_report.markdown(rows, metrics)]
        if missing := _missing(cells):
            lines += [f"Not run yet: {missing}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def is_older(cell: Mapping[str, Any]) -> bool:
    """Whether MeZO chose its step by an older rule, which did not note the score that it chose by."""
    mezo = cell["method"].startswith(("mezo", "lp_mezo"))
    return mezo and "not_applicable" not in cell and "dev_score" not in cell["chosen"]


def _older(found: Mapping[str, list[dict[str, Any]]]) -> str:
    number = sum(is_older(cell) for cells in found.values() for cell in cells)
    if not number:
        return ""
    return (
        f" {number} cells of MeZO were made by an older rule (rows with a †): the start was no candidate, and on cross entropy "
        "the step was chosen by the loss. They are being made again."
    )


def _edges(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """How often the best learning rate was the smallest or the largest of those that were tried."""
    grids = {
        "mezo_published": PUBLISHED_RATES,
        "fine_tuning": LEARNING_RATES["adam"],
        "fine_tuning_sgd": LEARNING_RATES["sgd"],
    }
    told = []
    for method, rates in grids.items():
        chosen = [
            cell["chosen"]["learning_rate"]
            for cells in found.values()
            for cell in cells
            if cell["method"] == method and "not_applicable" not in cell and cell["chosen"]["step"]
        ]
        ends = sum(rate in (min(rates), max(rates)) for rate in chosen)
        told.append(f"{ends} of {len(chosen)} ({compare_report.title_of({'method': method, 'title': method})})")
    return f"The best rate was at an end of the grid in {', '.join(told)} of the cells that moved at all; no grid was extended."


def _missing(cells: Sequence[Mapping[str, Any]]) -> str:
    done = {(cell["method"], cell["seed"]) for cell in cells}
    lacking = {m: [seed for seed in SEEDS if (m, seed) not in done] for m in (*MAIN, *REST)}
    return "; ".join(
        compare_report.title_of({"method": m, "title": m})
        + ("" if len(seeds) == len(SEEDS) else f" (seed {', '.join(map(str, seeds))})")
        for m, seeds in lacking.items()
        if seeds
    )


def metrics_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    known = {key for cell in cells for key in cell}
    return [metric for metric in ("accuracy", "macro_f1", "squad_f1", "exact_match") if metric in known]


class Difference(NamedTuple):
    """Of the means over the seeds that both have.

    Attributes:
        error: its standard error: over the seeds, and of so many test rows, the same ones for all seeds, as if the two methods
            erred independently of each other. With one seed that of the rows alone.
    """

    mean: float
    error: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors. One seed is too few to say."""
        return self.seeds > 1 and abs(self.mean) > 2 * self.error


def difference(cells: Sequence[Mapping[str, Any]], other: str, metric: str) -> Difference | None:
    """MeZO on the metric, less another method."""
    by = {(c["method"], c["seed"]): c for c in cells if c.get(metric) is not None}
    pairs = [(by["mezo", s], by[other, s]) for s in SEEDS if ("mezo", s) in by and (other, s) in by]
    if not pairs:
        return None
    values = [ours[metric] - theirs[metric] for ours, theirs in pairs]
    rows = pairs[0][0]["test_rows"]
    # A figure of a row is in [0, 1], so that its variance is p(1 − p) at most.
    means = [statistics.fmean(pair[i][metric] for pair in pairs) for i in (0, 1)]
    variance = sum(p * (1 - p) for p in means) / rows
    if len(values) > 1:
        variance += statistics.variance(values) / len(values)
    return Difference(statistics.fmean(values), math.sqrt(variance), len(values))


def claims(found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Where MeZO beats what the paper says it beats."""
    lines = [
        "## Where MeZO is ahead, and where it is not",
        "",
        "Zorl on the metric itself minus each of the others: the mean over the seeds that both have, ± its standard error over "
        "the seeds and of the test rows; bold where it is more than two standard errors, which with three seeds and so many "
        "comparisons some reach by chance. A dash: the method does not apply. The paper reports that MeZO beats zero-shot, "
        "in-context learning and linear probing, and comes close to fine-tuning.",
        "",
        f"| task | {' | '.join(AGAINST.values())} |",
        f"|---|{'---|' * len(AGAINST)}",
    ]
    ahead: dict[str, list[str]] = {other: [] for other in AGAINST}
    behind: dict[str, list[str]] = {other: [] for other in AGAINST}
    judged = dict.fromkeys(AGAINST, 0)
    for name, cells in found.items():
        metric, short = metrics_of(cells)[0], SETTINGS[name].title.replace(", the causal model", "")
        row = []
        for other in AGAINST:
            found_difference = difference(cells, other, metric)
            if found_difference is None:
                run = any(cell["method"] == other for cell in cells)
                row.append("—" if run else "not run")
                continue
            ranked = SETTINGS[name].ranks and found_difference.seeds > 1
            judged[other] += ranked
            figure = f"{found_difference.mean:+.3f} ± {found_difference.error:.3f}"
            if found_difference.clear and ranked:
                (ahead if found_difference.mean > 0 else behind)[other].append(short)
                figure = f"**{figure}**"
            row.append(figure if found_difference.seeds > 1 else f"{figure} (one seed)")
        lines.append(f"| {SETTINGS[name].title} ({metric}) | {' | '.join(row)} |")
    lines.append("")
    for other, title in AGAINST.items():
        if not judged[other]:
            continue
        lines.append(
            f"- {title}: of {judged[other]} tasks with more than one seed, clearly ahead on "
            f"{len(ahead[other])}{_list(ahead[other])}, clearly behind on {len(behind[other])}{_list(behind[other])}."
        )
    return [*lines, ""]


def _list(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def plot(found: Mapping[str, list[dict[str, Any]]], target: Path) -> None:
    """One panel per task, one line per method: the mean over the seeds, and each seed."""
    from matplotlib.figure import Figure

    methods = [
        m
        for m in (*MAIN, *REST)
        if any(c["method"] == m and "forwards" in c for cells in found.values() for c in cells)
    ]
    titles = {cell["method"]: compare_report.title_of(cell) for cells in found.values() for cell in cells}
    columns = 5
    lines = math.ceil(len(found) / columns)
    size = (3 + 2.2 * columns, (0.9 + 0.22 * len(methods)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (name, cells) in zip(axes.flat, found.items(), strict=False):
        metric = metrics_of(cells)[0]
        for y, method in enumerate(methods):
            values = [c[metric] for c in cells if c["method"] == method and c.get(metric) is not None]
            if values:
                ours = method.startswith(("mezo", "lp_mezo", "label_head"))
                colour = "#b3541e" if method.startswith("mezo_published") else "#1f5aa6" if ours else "#8a8a8a"
                axis.plot(values, [y] * len(values), "|", color=colour, markersize=7)
                axis.plot(statistics.fmean(values), y, "o", color=colour, markersize=5)
        axis.set_title(SETTINGS[name].title.replace(", the causal model", ""), fontsize=8)
        axis.set_xlabel(metric, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_yticks(range(len(methods)), [titles[method] for method in methods], fontsize=8)
        axis.set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel(
        "dot: the mean over the seeds, tick: a seed · blue: zorl, orange: the published recipe, grey: everything else",
        fontsize=9,
    )
    figure.savefig(target, dpi=110)


def main() -> None:
    found = {name: cells for name in SETTINGS if metrics_of(cells := cells_of(name))}
    (ROOT / "docs" / "results.md").write_text(report(found), encoding="utf-8")
    plot(found, ROOT / "docs" / "results.png")


if __name__ == "__main__":
    main()
