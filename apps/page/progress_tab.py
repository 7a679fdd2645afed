"""The Progress tab: how the verdicts have changed the model, and who gave them."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from zorl.apps.page.charts import Point, chart_html, percent, plain
from zorl.apps.page.components import LIGHT, html_block
from zorl.apps.page.figures import decided_share, win_rate
from zorl.apps.page.markup import notice_html, table_html, text
from zorl.apps.page.tuner_requests import Requests
from zorl.rewards.agreement import Agreement, Share, agreement
from zorl.rewards.judgment_store import JudgmentStore

SECONDS = 2.0  # between two updates; also the maximum age of a chart
TITLE = "Progress"
NO_STEP = "No step has been made yet."
BACK = "Going back…"
SURE = """(step) => confirm(`Go back to step ${step}? The steps after it are undone, and their verdicts stay in the raw log.`)
  ? step : null"""


@dataclass
class Charts:
    """The tab's HTML, drawn at most once every `SECONDS`, however many people look at it."""

    store: JudgmentStore
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _made: float = -1e9
    _html: tuple[str, str] = ("", "")

    def html(self) -> tuple[str, str]:
        """The charts, and the table of raters."""
        with self._lock:
            if time.monotonic() - self._made >= SECONDS:
                self._html = self._draw()
                self._made = time.monotonic()
            return self._html

    def _draw(self) -> tuple[str, str]:
        records = self.store.showings()
        judged = [
            (record.step + 1, record.opinion)  # as people count: the first step is step 1
            for record in records
            if record.opinion is not None and record.kind == "probe" and not record.repeat
        ]
        drift = [Point(step.step + 1, step.figures["drift"]) for step in self.store.steps() if "drift" in step.figures]
        compared = [(vote.step, vote.choice) for vote in self.store.comparisons()]
        found = agreement(records)
        drawn = (_win_rate(win_rate(compared)), _decided(decided_share(judged)), _drift(drift), _agreement(found))
        return f'<div class="z-charts">{"".join(drawn)}</div>', _raters(found)


def build(tabs: gr.Tabs, store: JudgmentStore) -> None:
    """Fills the tab, and keeps it up to date while it is visible."""
    charts = Charts(store)
    with gr.Column(elem_id="charts-column"):
        drawn = html_block(elem_id="charts")
        table = html_block(elem_id="raters")
    seen = gr.Textbox(
        visible=False
    )  # digest of what the browser shows: sending the same again would close what people have opened
    timer = gr.Timer(SECONDS, active=False)

    def look(known: str | None) -> tuple[Any, ...]:
        html = charts.html()
        paused = store.tuner().get("state") == "paused"
        digest = hashlib.sha256("".join((*html, str(paused))).encode()).hexdigest()
        return (gr.skip(),) * 4 if digest == known else (*html, digest, gr.Button(visible=paused))

    def turn(event: gr.SelectData) -> Any:
        return gr.Timer(active=event.value == TITLE)

    resume = _go_back(store)
    shown = [drawn, table, seen, resume]
    tabs.select(turn, None, timer, **LIGHT).then(look, [seen], shown, **LIGHT)
    timer.tick(look, [seen], shown, **LIGHT)


def _go_back(store: JudgmentStore) -> gr.Button:
    """Adds the controls that undo the latest steps. Returns the button that continues after a pause because of drift."""
    wanted, on = Requests(store, "rewind"), Requests(store, "go_on")
    html_block(
        '<div class="z-part"><h2>Go back</h2><p>Undoes the latest steps: the model returns to its state after the '
        "given step, and tuning continues from there. The raw log keeps everything.</p></div>"
    )
    with gr.Row(elem_id="rewind", equal_height=False):
        step = gr.Number(0, label="Step", minimum=0, precision=0, elem_id="rewind-step", scale=0, min_width=140)
        button = gr.Button("Go back to this step", elem_id="rewind-button", scale=0, min_width=200)
        resume = gr.Button("Continue despite the drift", visible=False, elem_id="go-on", scale=0, min_width=200)
    said = html_block(elem_id="rewind-said")
    asked = gr.Number(0, visible=False, precision=0)
    timer = gr.Timer(1.0, active=False)

    def ask(wished: float | None) -> tuple[Any, ...]:
        if wished is None:  # the dialog was cancelled
            return gr.skip(), gr.skip(), gr.skip()
        done = len(store.steps())
        if not 0 <= wished < done:
            sorry = f"{done} steps have been made: choose a step from 0 to {done - 1}." if done else NO_STEP
            return gr.skip(), gr.skip(), notice_html(sorry)
        return wanted.ask(step=int(wished)), gr.Timer(active=True), notice_html(wanted.waiting(BACK))

    def look(request: float | None) -> tuple[Any, ...]:
        try:
            if request and wanted.answer(int(request)) is None:
                return gr.skip(), notice_html(wanted.waiting(BACK))
        except ValueError as error:
            return gr.Timer(active=False), notice_html(str(error))
        return gr.Timer(active=False), notice_html("The model is back at that step.")

    def go_on() -> str:
        if store.tuner().get("state") != "paused":
            return notice_html("Tuning is not paused.")
        on.ask()
        return notice_html("Tuning continues with the next verdicts.")

    button.click(ask, [step], [asked, timer, said], js=SURE, **LIGHT)
    timer.tick(look, [asked], [timer, said], **LIGHT)
    resume.click(go_on, None, [said], **LIGHT)
    return resume


def _win_rate(points: list[Point]) -> str:
    last = points[-1] if points else None
    about = "Share of blind comparisons that the current model wins against the starting model; ties count as halves."
    if last is not None and last.low is not None and last.high is not None:
        about = (
            f"of the latest {last.n} blind comparisons are won by the current model; ties count as halves. 95% interval: "
            f"{last.low:.0%} to {last.high:.0%}."
        )
    return chart_html(
        "Win rate against the starting model",
        percent(last.value) if last else "–",
        about,
        points,
        top=1.0,
        line=0.5,
        empty="Comparisons start after the first step.",
    )


def _decided(points: list[Point]) -> str:
    return chart_html(
        "Decided share",
        percent(points[-1].value) if points else "–",
        "of the verdicts on the latest step prefer one answer. The rest are ties, which teach the model little.",
        points,
        top=1.0,
        empty="Nobody has judged yet.",
    )


def _drift(points: list[Point]) -> str:
    return chart_html(
        "Drift",
        plain(points[-1].value) if points else "–",
        "nats per token between the current and the starting model. A high value warns of answers that no longer make sense.",
        points,
        shown=plain,
        empty=NO_STEP,
    )


def _agreement(found: Agreement) -> str:
    about = "Krippendorff's alpha: 1 is perfect agreement between raters, 0 is agreement by chance."
    facts = (
        ("Pairs judged by several raters", str(found.shared_pairs)),
        ("The left answer wins", _share(found.first)),
        ("Same verdict when sides are swapped", _share(found.consistency)),
    )
    listed = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return (
        '<figure class="z-card z-chart" aria-label="Agreement of raters"><h2>Agreement of raters</h2>'
        f'<p class="z-headline">{text(_or_dash(found.alpha, plain))}</p><p class="z-about">{text(about)}</p>'
        f'<dl class="z-facts">{listed}</dl></figure>'
    )


def _raters(found: Agreement) -> str:
    if not found.raters:
        return ""
    headings = (
        "Rater",
        "Verdicts",
        "Left wins",
        "Consistent",
        "Agrees with others",
        "Ties",
        "Skipped",
        "Seconds per verdict",
    )
    rows = [
        (
            rater.name,
            rater.votes,
            _or_dash(rater.first.value, percent),
            _or_dash(rater.consistency.value, percent),
            _or_dash(rater.with_others.value, percent),
            rater.ties,
            rater.abstained,
            _or_dash(rater.seconds, plain),
        )
        for rater in found.raters
    ]
    return f'<section class="z-card z-part"><h2>Raters</h2>{table_html("Raters", headings, rows)}</section>'


def _share(share: Share) -> str:
    return f"{share.value:.0%} of {share.n} ({share.low:.0%}–{share.high:.0%})" if share.n else "–"


def _or_dash(value: float, shown: Callable[[float], str]) -> str:
    return "–" if math.isnan(value) else shown(value)
