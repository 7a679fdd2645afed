"""The Judge tab: a prompt, two answers, one key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from zorl.apps.page.components import LIGHT, html_block
from zorl.apps.page.desk import AWAY, Desk, Turn, new_name
from zorl.apps.page.markup import answers_html, notice_html, prompt_html, text
from zorl.probe import Choice
from zorl.rewards.judgment_records import Progress, Showing
from zorl.wording import counted, lasting

SECONDS = 1.0  # between two updates from the store while nobody clicks
LONG = 120.0  # seconds without a report of a trainer at work, after which the page says for how long
DONE = "You have judged every pair."
WAITING = "The model is writing the next pairs…"
# Label, id and verdict. The keys are in keys.js; page.css prints them on the buttons.
BUTTONS = (
    ("A is better", "vote-a", Choice.FIRST),
    ("Tie", "vote-tie", Choice.TIE),
    ("Both bad", "vote-bad", Choice.BOTH_BAD),
    ("B is better", "vote-b", Choice.SECOND),
    ("Skip", "vote-skip", Choice.ABSTAIN),
)
STATES = {
    "starting": "loading the model",
    "generating": "writing pairs",
    "computing": "computing a step",
    "answering": "answering a request",
    "waiting": "waiting for verdicts",
    "unconnected": "no trainer connected",
    "silent": "not answering",
    "paused": "paused",
    "stopped": "stopped",
    "failed": "failed",
}
# States in which no new pair will appear by itself, and what the page says in its place.
DOWN = {
    "failed": "The model has stopped.",
    "stopped": "The model is not running.",
    "paused": "Tuning is paused.",
    "unconnected": "No trainer is connected yet.",
    "silent": "The trainer does not answer.",
}


def pair_html(showing: Showing | None, progress: Progress) -> str:
    """The pair in front of a rater. `data-showing` tells keys.js which pair is on the screen."""
    if showing is None:
        state, said = str(progress.tuner.get("state")), str(progress.tuner.get("message", ""))
        if state in DOWN:
            return f'<div class="z-pair z-waiting"><h2>{DOWN[state]}</h2><p>{text(said)}</p></div>'
        missing = progress.votes_needed - progress.votes_given
        if state == "waiting" and missing > 0:
            wanted = counted(missing, "verdict of another rater is", "verdicts of other raters are")
            return f'<div class="z-pair z-waiting"><h2>{DONE}</h2><p>{wanted} needed for the next step.</p></div>'
        ready = "They will appear here as soon as they are ready."
        # While it writes it does not report; only a person can tell whether this is long for this model on its machine.
        if (age := float(progress.tuner.get("age", 0))) >= LONG:
            ready += f" The trainer last reported {lasting(age)} ago; if that is unusual, see whether it still runs."
        return (
            '<div class="z-pair z-waiting"><span class="z-pulse" aria-hidden="true"></span>'
            f"<h2>{WAITING}</h2><p>{ready}</p></div>"
        )
    return (
        f'<article class="z-pair" data-showing="{showing.id}"><section class="z-prompt" aria-label="Prompt">'
        f"<h2>Prompt</h2>{prompt_html(showing.prompt)}</section>"
        f"{answers_html(showing.first, showing.second, ('Answer A', 'Answer B'), ('A', 'B'))}</article>"
    )


def status_html(progress: Progress, *, steps: bool = True, judging: bool = False) -> str:
    """Verdicts needed for the next step, steps done, pairs in the queue, and what the model is doing.

    Args:
        steps: whether the steps are in the store. They are not if `zorl train` makes them.
        judging: whether a pair is shown, and not, in its place, why there is none.
    """
    state = str(progress.tuner.get("state", "starting"))
    step = f"step {progress.steps + 1}" if steps else "the next step"
    needed, given = progress.votes_needed, progress.votes_given
    missing = needed - given
    computing = state == "computing" or (needed > 0 and missing <= 0 and state == "waiting")
    if computing:
        said, given = f"Computing {step}", needed
    elif not needed:
        said = f"{step[0].upper()}{step[1:]} is being prepared"
    else:
        said = f"<b>{given}</b> of {needed} verdicts for {step}"
        if progress.votes_skipped:
            said += f" ({progress.votes_skipped} skipped)"
        if 0 < missing <= progress.votes_held:
            said += (
                "; the last pair is with another rater"
                if missing == 1
                else f"; the other {missing} are with other raters"
            )
    share = 1.0 if computing else min(given / max(needed, 1), 1.0)
    bar = (
        f'<div class="z-bar" role="progressbar" aria-valuemin="0" aria-valuemax="{max(needed, 1)}" aria-valuenow="{given}" '
        f'aria-label="Verdicts for {step}"><i style="width:{share:.0%}"></i></div>'
    )
    facts = "".join(
        f"<li><b>{number}</b> {label}</li>"
        for number, label in (
            *([(progress.steps, "step done" if progress.steps == 1 else "steps done")] if steps else []),
            (progress.open_pairs, "pair in the queue" if progress.open_pairs == 1 else "pairs in the queue"),
            (progress.verdicts, "verdict so far" if progress.verdicts == 1 else "verdicts so far"),
        )
    )
    doing = (
        f'<li class="z-model z-is-{text(state)}" title="{text(progress.tuner.get("message", ""))}">'
        f"Model: {text(STATES['computing'] if computing else STATES.get(state, state))}</li>"
    )
    why = (
        f'<p class="z-why">{DOWN[state]} {text(progress.tuner.get("message", ""))}</p>'
        if judging and state in DOWN
        else ""
    )
    return (
        f'<div class="z-status" data-undo="{"yes" if progress.can_undo else "no"}"><div class="z-next"><span>{said}</span>'
        f"{bar}</div><ul>{facts}{doing}</ul>{why}</div>"
    )


def guidelines_html(guidelines: str) -> str:
    """The first line is the question and stays in view; the rest can be folded. Lines that begin with a dash form a list."""
    question, _, rest = guidelines.strip().partition("\n")
    blocks = []
    for block in rest.strip().split("\n\n"):
        lines = block.strip().splitlines()
        if lines and all(line.startswith("- ") for line in lines):
            blocks.append(f"<ul>{''.join(f'<li>{text(line[2:])}</li>' for line in lines)}</ul>")
        elif lines:
            blocks.append(f"<p>{text(' '.join(lines))}</p>")
    heading = f"<h1>{text(question)}</h1>"
    if not blocks:
        return f'<div class="z-guidelines">{heading}</div>'
    return f'<div class="z-guidelines">{heading}<details><summary>Guidelines</summary>{"".join(blocks)}</details></div>'


def build(
    blocks: gr.Blocks,
    desk: Desk,
    guidelines: str,
    name: gr.Textbox,
    remembered: gr.BrowserState | None,
    *,
    steps: bool = True,
) -> None:
    """Fills the tab.

    Args:
        blocks: the page.
        name: the field with the rater's name.
        remembered: where the browser stores the name; None if raters sign in.
        steps: see `status_html`.
    """
    html_block(guidelines_html(guidelines), elem_id="guidelines")
    status = html_block(elem_id="status")
    notice = html_block(elem_id="notice")
    pair = html_block(pair_html(None, desk.progress()), elem_id="pair")
    # The page says which pair it shows, so that a late verdict never counts for the pair after it.
    showing = gr.Number(0, visible=False, precision=0)
    with gr.Column(elem_id="actions"):
        with gr.Row(elem_id="verdicts", equal_height=True):
            verdicts = [gr.Button(label, elem_id=id, elem_classes="z-key") for label, id, _ in BUTTONS[:4]]
        with gr.Row(elem_id="extras"):
            undo = gr.Button("Undo", elem_id="undo", elem_classes="z-key", size="sm")
            verdicts.append(gr.Button("Skip", elem_id="vote-skip", elem_classes="z-key", size="sm"))
    shown = [pair, showing, status, notice]

    def shown_to(turn: Turn, progress: Progress) -> tuple[Any, ...]:
        return (
            pair_html(turn.showing, progress),
            turn.showing.id if turn.showing else 0,
            status_html(progress, steps=steps, judging=turn.showing is not None),
            notice_html(turn.notice),
        )

    def turned(act: Callable[[str], Turn], given: str, request: gr.Request) -> tuple[Any, ...]:
        try:
            who = desk.name(given, request.username)
            return shown_to(act(who), desk.progress(who))
        except ConnectionError:
            return gr.skip(), gr.skip(), gr.skip(), notice_html(AWAY)
        except ValueError as error:
            return gr.skip(), gr.skip(), gr.skip(), notice_html(str(error))

    def voter(choice: Choice) -> Callable[..., tuple[Any, ...]]:
        def vote(shown: float | None, given: str, request: gr.Request) -> tuple[Any, ...]:
            act = partial(desk.vote, showing=int(shown), choice=choice) if shown else desk.next_pair
            return turned(act, given, request)

        return vote

    def take_back(given: str, request: gr.Request) -> tuple[Any, ...]:
        return turned(desk.undo, given, request)

    def look(shown: float | None, given: str, noted: str, request: gr.Request) -> tuple[Any, ...]:
        """Called by the timer: fetches a pair if none is shown, or if it takes no verdict any more; else updates the status."""
        try:
            who = desk.name(given, request.username)
            turn = desk.keep(who, int(shown)) if shown else desk.next_pair(who)
            progress = desk.progress(who)
        except ConnectionError:
            return gr.skip(), gr.skip(), gr.skip(), notice_html(AWAY)
        except ValueError:
            return (gr.skip(),) * 4
        # A notice stays until the rater does something; that of an outage, until it is over.
        kept = gr.skip() if AWAY not in noted else notice_html("")
        if turn is None:
            return gr.skip(), gr.skip(), status_html(progress, steps=steps, judging=True), kept
        pair, number, status, notice = shown_to(turn, progress)
        return pair, number, status, notice if turn.notice else kept

    for button, (_, _, choice) in zip(verdicts, BUTTONS, strict=True):
        button.click(voter(choice), [showing, name], shown, **LIGHT)
    undo.click(take_back, [name], shown, **LIGHT)
    gr.Timer(SECONDS).tick(look, [showing, name, notice], shown, **LIGHT)

    def greet(kept: str | None, request: gr.Request) -> tuple[Any, ...]:
        who = request.username or kept or new_name()
        return who, who, *turned(desk.next_pair, who, request)

    def welcome(request: gr.Request) -> tuple[Any, ...]:
        return request.username, *turned(desk.next_pair, "", request)

    def rename(given: str, before: str | None, request: gr.Request) -> tuple[Any, ...]:
        def go_on(name: str) -> Turn:
            if before and before != name:
                desk.leave(before)
            return desk.next_pair(name)

        return given.strip(), *turned(go_on, given, request)

    if remembered is None:
        blocks.load(welcome, None, [name, *shown], **LIGHT)
    else:
        blocks.load(greet, [remembered], [name, remembered, *shown], **LIGHT)
        name.blur(rename, [name, remembered], [remembered, *shown], **LIGHT)  # keys.js leaves the field at Enter
