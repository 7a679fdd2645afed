"""The Try it tab: one prompt, answered by the starting model and by the current one."""

from __future__ import annotations

from typing import Any

import gradio as gr

from zorl.apps.page.components import LIGHT, html_block
from zorl.apps.page.desk import AWAY
from zorl.apps.page.markup import answers_html, notice_html
from zorl.apps.page.tuner_requests import Requests
from zorl.rewards.judgment_store import JudgmentStore

SECONDS = 0.5  # between two checks for the answer
LONGEST = 4000  # characters of a prompt
WRITING = "Both models are writing…"


def build(store: JudgmentStore, example: str) -> None:
    """Fills the tab. `example` is the placeholder of the prompt field."""
    tries = Requests(store, "try")
    html_block(
        '<div class="z-part"><h2>Before and after</h2><p>The same prompt, answered by the starting model and by the '
        "current model, with the same random draws.</p></div>"
    )
    with gr.Row(equal_height=False, elem_id="ask"):
        prompt = gr.Textbox(
            label="Prompt", placeholder=example, lines=2, max_lines=8, max_length=LONGEST, elem_id="try-prompt", scale=5
        )
        button = gr.Button("Compare", variant="primary", elem_id="try-button", scale=1, min_width=140)
    answers = html_block(elem_id="try-answers")
    asked = gr.Number(0, visible=False, precision=0)
    timer = gr.Timer(SECONDS, active=False)

    def ask(written: str) -> tuple[Any, ...]:
        wanted = written.strip()[:LONGEST] or example
        try:
            return tries.ask(prompt=wanted), gr.Timer(active=True), notice_html(tries.waiting(WRITING))
        except ConnectionError:
            return gr.skip(), gr.skip(), notice_html(AWAY)

    def look(request: float | None) -> tuple[Any, ...]:
        if not request:
            return gr.Timer(active=False), gr.skip()
        try:
            result = tries.answer(int(request))
            if result is None:
                return gr.skip(), notice_html(tries.waiting(WRITING))
        except ConnectionError:
            return gr.skip(), notice_html(AWAY)
        except ValueError as error:
            return gr.Timer(active=False), notice_html(str(error))
        titles = ("Starting model", f"Current model, after step {result['step']}")
        return gr.Timer(active=False), answers_html(str(result["start"]), str(result["current"]), titles)

    gr.on([button.click, prompt.submit], ask, [prompt], [asked, timer, answers], **LIGHT)
    timer.tick(look, [asked], [timer, answers], **LIGHT)
