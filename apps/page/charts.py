"""Small line charts in SVG: they adapt to light and dark mode and to any width, and have a table of their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zorl.apps.page.markup import table_html, text


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a step, from `n` observations; `low` and `high` are the ends of its interval, if it has one."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0


def percent(value: float) -> str:
    return f"{value:.0%}"


def plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def chart_html(
    title: str,
    headline: str,
    about: str,
    points: Sequence[Point],
    *,
    top: float | None = None,
    line: float | None = None,
    shown: Callable[[float], str] = percent,
    empty: str = "Nothing to show yet.",
) -> str:
    """One chart: a title, the latest value in large type, a sentence, and the line with its band.

    Args:
        points: in the order of their steps.
        top: the value at the upper edge; None: chosen to fit the points.
        line: the value of a dashed line, such as chance.
        shown: formats a value.
        empty: a sentence that replaces the line if there are no points.
    """
    head = f'<h2>{text(title)}</h2><p class="z-headline">{text(headline)}</p><p class="z-about">{text(about)}</p>'
    if not points:
        return f'<figure class="z-card z-chart" aria-label="{text(title)}">{head}<p class="z-nothing">{text(empty)}</p></figure>'
    ceiling = top if top is not None else _ceiling(max(p.value if p.high is None else p.high for p in points))
    first, last = points[0].step, points[-1].step

    def x(point: Point) -> float:
        return 50.0 if last == first else 1 + 98 * (point.step - first) / (last - first)

    def y(value: float) -> float:
        return 100 - 100 * min(max(value / ceiling, 0.0), 1.0)

    path = " ".join(f"{'L' if i else 'M'}{x(p):.2f} {y(p.value):.2f}" for i, p in enumerate(points))
    bounded = [(p, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    band = [f"{x(p):.2f},{y(high):.2f}" for p, _, high in bounded]
    band += [f"{x(p):.2f},{y(low):.2f}" for p, low, _ in reversed(bounded)]
    drawn = "".join(f'<path class="z-grid" d="M0 {level} H100"/>' for level in (0, 50, 100))
    drawn += f'<polygon class="z-band" points="{" ".join(band)}"/>' if len(bounded) > 1 else ""
    if line is not None:
        drawn += f'<path class="z-line" d="M0 {y(line):.2f} H100"/>'
    drawn += (
        f'<path class="z-curve" d="{path}"/><path class="z-dot" d="M{x(points[-1]):.2f} {y(points[-1].value):.2f} h0"/>'
    )
    axis = "".join(f"<span>{text(shown(ceiling * share))}</span>" for share in (1, 0.5, 0))
    steps = f"<span>step {first}</span>" + (f"<span>step {last}</span>" if last != first else "")
    rows = [
        (p.step, shown(p.value), *(() if p.low is None or p.high is None else (f"{shown(p.low)}–{shown(p.high)}",)))
        for p in points[-200:]
    ]
    headings = ["Step", title, *(["95% interval"] if bounded else [])]
    return (
        f'<figure class="z-card z-chart" aria-label="{text(title)}: {text(headline)}">{head}'
        '<div class="z-plot" aria-hidden="true">'
        f'<div class="z-y">{axis}</div><svg viewBox="0 0 100 100" preserveAspectRatio="none">{drawn}</svg>'
        f'<div class="z-x">{steps}</div></div><details><summary>Figures</summary>{table_html(title, headings, rows)}'
        "</details></figure>"
    )


def _ceiling(largest: float) -> float:
    """The smallest of 1, 2, 5, 10, … times a power of ten that is not below `largest`."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** len(str(int(largest))) if largest >= 1 else 1.0
    while power / 10 >= largest:
        power /= 10
    return next(power * share for share in (0.2, 0.5, 1.0) if power * share >= largest)
