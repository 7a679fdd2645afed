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
from zorl.apps.page.desk import AWAY
from zorl.apps.page.figures import decided_share, win_rate
from zorl.apps.page.markup import notice_html, table_html, text
from zorl.apps.page.tuner_requests import Requests
from zorl.rewards.agreement import Agreement, Share, agreement
from zorl.rewards.judgment_store import JudgmentStore

SECONDS = 2.0  # between two updates; also the maximum age of a chart
TITLE = "Progress"
NO_STEP = "No step has been made yet."
BACK = "Going back…"
SURE = """(step) => step !== null && confirm(
  `Go back to step ${step}? The steps after it are undone, and their verdicts stay in the raw log.`) ? step : null"""


@dataclass
class Charts:
    """The tab's HTML, drawn when there is something new, at most once every `SECONDS`, however many people look at it."""

    store: JudgmentStore
    steps: bool = True  # whether the steps are in the store
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _looked: float = -1e9
    _revision: tuple[int, ...] = ()
    _html: tuple[str, str] = ("", "")

    def html(self) -> tuple[str, str]:
        """The charts, and the table of raters."""
        with self._lock:
            if time.monotonic() - self._looked >= SECONDS:
                revision = self.store.revision()  # before the rest: what comes in between is drawn the next time
                if revision != self._revision:
                    self._html = self._draw()
                self._revision, self._looked = revision, time.monotonic()
            return self._html

    def _draw(self) -> tuple[str, str]:
        records = self.store.showings()
        found = agreement(records)
        if not self.steps:
            return f'<div class="z-charts">{_agreement(found)}</div>', _raters(found)
        steps = self.store.steps()
        # Verdicts on steps that were undone, or are withdrawn, say nothing about the model as it is.
        in_force = {step.probe for step in steps} | {probe.id for probe in self.store.open_probes()}
        judged = [
            (record.step + 1, record.opinion)  # as people count: the first step is step 1
            for record in records
            if record.opinion is not None and record.probe in in_force and not record.repeat
        ]
        drift = [Point(step.step + 1, step.figures["drift"]) for step in steps if "drift" in step.figures]
        drawn = (
            _win_rate(win_rate(self.store.comparisons())),
            _decided(decided_share(judged)),
            _drift(drift),
            _agreement(found),
        )
        return f'<div class="z-charts">{"".join(drawn)}</div>', _raters(found)


def build(tabs: gr.Tabs, store: JudgmentStore, *, steps: bool = True) -> None:
    """Fills the tab, and keeps it up to date while it is visible.

    Args:
        steps: whether the steps are in the store. If not, none can be drawn or undone.
    """
    charts = Charts(store, steps)
    with gr.Column(elem_id="charts-column"):
        drawn = html_block(elem_id="charts")
        table = html_block(elem_id="raters")
    # Digest of what the browser shows: sending the same again would close what people have opened.
    seen = gr.Textbox(visible=False)
    timer = gr.Timer(SECONDS, active=False)

    def look(known: str | None) -> tuple[Any, ...]:
        try:
            html = charts.html()
            paused = store.tuner().get("state") == "paused"
        except ConnectionError:  # the Judge tab says so
            return (gr.skip(),) * 4
        digest = hashlib.sha256("".join((*html, str(paused))).encode()).hexdigest()
        return (gr.skip(),) * 4 if digest == known else (*html, digest, gr.Button(visible=paused))

    def turn(event: gr.SelectData) -> Any:
        return gr.Timer(active=event.value == TITLE)

    resume = _go_back(store) if steps else gr.Button(visible=False)
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
        step = gr.Number(0, label="Step", elem_id="rewind-step", scale=0, min_width=140)
        button = gr.Button("Go back to this step", elem_id="rewind-button", scale=0, min_width=200)
        resume = gr.Button("Continue despite the drift", visible=False, elem_id="go-on", scale=0, min_width=200)
        said = html_block(elem_id="rewind-said")
    sound = gr.Number(None, visible=False)
    asked = gr.Number(0, visible=False, precision=0)
    timer = gr.Timer(1.0, active=False)

    def check(wished: float | None) -> tuple[Any, ...]:
        """Before the question whether somebody is sure: a step that does not exist is refused."""
        try:
            sorry = refusal(wished, store.count_steps())
        except ConnectionError:
            sorry = AWAY
        return None if sorry else wished, notice_html(sorry)

    def ask(wished: float | None) -> tuple[Any, ...]:
        if wished is None:  # the step was refused, or the dialog cancelled
            return gr.skip(), gr.skip(), gr.skip()
        try:
            return wanted.ask(step=int(wished)), gr.Timer(active=True), notice_html(wanted.waiting(BACK))
        except ConnectionError:
            return gr.skip(), gr.skip(), notice_html(AWAY)

    def look(request: float | None) -> tuple[Any, ...]:
        try:
            result = wanted.answer(int(request)) if request else None
            if result is None:
                return gr.skip(), notice_html(wanted.waiting(BACK))
        except ConnectionError:
            return gr.skip(), notice_html(AWAY)
        except ValueError as error:
            return gr.Timer(active=False), notice_html(str(error))
        return gr.Timer(active=False), notice_html(f"The model is back at step {result['step']}.")

    def go_on() -> str:
        try:
            if store.tuner().get("state") != "paused":
                return notice_html("Tuning is not paused.")
            on.ask()
        except ConnectionError:
            return notice_html(AWAY)
        return notice_html("Tuning continues. It pauses again if the model drifts as far once more.")

    checked = button.click(check, [step], [sound, said], **LIGHT)
    checked.then(None, [sound], [sound], js=SURE).then(ask, [sound], [asked, timer, said], **LIGHT)
    timer.tick(look, [asked], [timer, said], **LIGHT)
    resume.click(go_on, None, [said], **LIGHT)
    return resume


def refusal(wished: float | None, done: int) -> str:
    """Why a run of so many steps cannot go back to a step; empty if it can."""
    if not done:
        return NO_STEP
    if wished is not None and float(wished).is_integer() and 0 <= wished < done:
        return ""
    if done == 1:
        return "1 step has been made; the only step to go back to is 0."
    return f"{done} steps have been made; choose a whole number from 0 to {done - 1}."


def _win_rate(points: list[Point]) -> str:
    last = points[-1] if points else None
    about = "Share of blind comparisons that the tuned model wins against the starting model; ties count as halves."
    if last is not None and last.low is not None and last.high is not None:
        about = (
            f"{'of the latest ' + str(last.n) + ' blind comparisons were' if last.n > 1 else 'of 1 blind comparison was'} won "
            f"by the tuned model of that time; ties count as halves. 95% interval: {last.low:.0%} to {last.high:.0%}."
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
        "nats per token between the current and the starting model. A large value can mean answers that please but no longer "
        "make sense.",
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
