"""The finished cells of `zorl compare` as a table (text, CSV and Markdown) and as a plot."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zorl.apps.compare_methods import METHODS

Cell = Mapping[str, Any]


def summary(cells: Sequence[Cell], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method, in the order of the cells: mean and sample standard deviation of each figure over the seeds.

    A method that applies with none of the seeds has the reason under `not_applicable`. What else a reader should know is under
    `note`. `forwards` counts all forward passes that were spent on learning, including those of a search for settings.
    """
    methods = dict.fromkeys(cell["method"] for cell in cells)
    rows = []
    for method in methods:
        every = [cell for cell in cells if cell["method"] == method]
        mine = [{**cell, "forwards": _spent(cell)} for cell in every if "not_applicable" not in cell]
        row: dict[str, Any] = {"method": method, "title": title_of(every[0]), "seeds": len(mine)}
        if not mine:
            rows.append({**row, "not_applicable": every[0]["not_applicable"]})
            continue
        for figure in (*metrics, "forwards", "seconds", "peak_memory_mb"):
            values = [cell[figure] for cell in mine if cell.get(figure) is not None]
            row[figure] = statistics.fmean(values) if values else None
            row[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
        note = _demonstrations(mine)
        rows.append({**row, "note": note} if note else row)
    return rows


def title_of(cell: Cell) -> str:
    """The title of the cell's method: the one that it has now, or what the cell calls a method that is gone."""
    method = METHODS.get(cell["method"])
    return str(cell["title"]) if method is None else method.title


def notes(rows: Sequence[Cell]) -> list[str]:
    """Sentences that belong under the table: why methods do not apply, and what the figures of others rest on."""
    return [f"{row['title']}: {row[kind]}" for row in rows for kind in ("not_applicable", "note") if kind in row]


def table(rows: Sequence[Cell], metrics: Sequence[str]) -> list[list[str]]:
    """The cells of the table as text: a heading, and one line per method."""
    lines = [["method", *metrics, "forwards", "seconds", "memory MB", "seeds"]]
    for row in rows:
        if "not_applicable" in row:
            lines.append([row["title"], *["—"] * (len(metrics) + 3), "0"])
            continue
        figures = [_spread(row[metric], row[f"{metric}_std"]) for metric in metrics]
        costs = ["—" if row[name] is None else f"{row[name]:.0f}" for name in ("forwards", "seconds", "peak_memory_mb")]
        lines.append([row["title"], *figures, *costs, str(row["seeds"])])
    return lines


def text(rows: Sequence[Cell], metrics: Sequence[str]) -> str:
    """The table for a terminal, with its notes below."""
    lines = table(rows, metrics)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
              for line in lines]  # fmt: skip
    below = notes(rows)
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:], *([""] if below else []), *below])


def markdown(rows: Sequence[Cell], metrics: Sequence[str]) -> str:
    """The table in Markdown, with its notes as a list below."""
    head, *lines = table(rows, metrics)
    below = [f"- {note}" for note in notes(rows)]
    body = [_line(head), _line(["---"] * len(head)), *map(_line, lines), *([""] if below else []), *below]
    return "\n".join(body) + "\n"


def write_csv(rows: Sequence[Cell], metrics: Sequence[str], path: Path) -> None:
    names = [
        name for figure in (*metrics, "forwards", "seconds", "peak_memory_mb") for name in (figure, f"{figure}_std")
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["method", "title", "seeds", *names, "not_applicable", "note"])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Cell], cells: Sequence[Cell], metric: str, title: str, path: Path) -> None:
    """Plots the first metric of each method: the mean as a bar, each seed as a dot."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get(metric) is not None]
    figure = Figure(figsize=(8, 1.2 + 0.34 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(shown):
        ours = row["method"].startswith(("mezo", "lp_mezo", "label_head"))
        seeds = [c[metric] for c in cells if c["method"] == row["method"] and c.get(metric) is not None]
        axes.barh(y, row[metric], color="#1f5aa6" if ours else "#b3b3b3", height=0.7)
        axes.plot(seeds, [y] * len(seeds), "o", color="#111111", markersize=3.5)
    axes.set_yticks(range(len(shown)), [row["title"] for row in shown])
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric} on the test rows (one dot per seed)", title=title)
    lowest = min((c[metric] for c in cells if c.get(metric) is not None), default=0.0)
    axes.set_xlim(max(0.0, lowest - 0.1) if lowest >= 0 else None, None)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def _demonstrations(cells: Sequence[Cell]) -> str | None:
    """How many demonstrations fitted into the prompts of a method's cells; None for other methods."""
    chosen = [cell.get("chosen") or {} for cell in cells]
    counts = [each["demonstrations"] for each in chosen if "demonstrations" in each]
    if not counts:
        return None
    cuts = sorted(each["cut_to_characters"] for each in chosen if each.get("cut_to_characters") is not None)
    note = f"{round(statistics.fmean(counts), 1):g} on average"
    if not cuts:
        return note
    span = f"{cuts[0]}" if cuts[0] == cuts[-1] else f"{cuts[0]}–{cuts[-1]}"
    return f"{note}, their values cut to {span} characters for {len(cuts)} of {len(counts)} seeds"


def _spent(cell: Cell) -> int:
    chosen: Mapping[str, Any] = cell.get("chosen") or {}
    return int(chosen.get("search_forwards", cell["forwards"]))


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "—"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
