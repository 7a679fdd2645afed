"""The Export tab: verdicts, model and trajectory as files."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from zorl.apps.page.components import LIGHT, html_block
from zorl.apps.page.markup import notice_html, text
from zorl.apps.page.tuner_requests import Requests
from zorl.rewards.judgment_store import JudgmentStore
from zorl.rewards.preferences import write_events, write_preferences

KEPT = 3600.0  # seconds for which a file stays here after it was written
SECONDS = 0.7  # between two checks whether the model is ready
WRITING = "Writing the tuned model…"
# Clicks the link that Gradio has just put behind a hidden button.
FETCH = """(id) => {
  const link = document.querySelector(`#${id}`)?.closest('a') ?? document.querySelector(`a#${id}, #${id} a`);
  (link ?? document.getElementById(id))?.click();
}"""


def build(store: JudgmentStore, run: Path, folder: Path, *, model: bool = True) -> None:
    """Fills the tab.

    Args:
        run: the run's folder.
        folder: the folder for files to download; Gradio serves copies of these, and nothing else.
        model: whether the run has a model and a trajectory.
    """
    with gr.Row(elem_classes="z-exports", equal_height=True):
        _file(
            "Preferences",
            "JSON Lines with prompt, chosen and rejected, for TRL's DPOTrainer: the majority verdict on each pair, without "
            "ties and without the comparisons with the starting model.",
            "preferences",
            lambda: _preferences(store, folder),
        )
        _file(
            "Raw log",
            "JSON Lines with everything that happened, in order: pairs shown, verdicts, undos, late verdicts.",
            "log",
            lambda: _events(store, folder),
        )
    if not model:
        return
    with gr.Row(elem_classes="z-exports", equal_height=True):
        _model(store, run, folder)
        _file(
            "Trajectory",
            "The few kilobytes from which zorl replay rebuilds the tuned model at any step.",
            "trajectory",
            lambda: _trajectory(run, folder),
        )


def _file(title: str, about: str, id: str, make: Callable[[], tuple[Path, str]]) -> None:
    """A card with a button. A click writes the file anew and downloads it."""
    with gr.Column(elem_classes="z-file"):
        button, said = _card(title, about, id)
        link = gr.DownloadButton(visible="hidden", elem_id=f"fetch-{id}")

        def write() -> tuple[Any, ...]:
            try:
                file, told = make()
            except (ValueError, OSError) as error:
                return gr.skip(), notice_html(str(error)), ""
            return str(file), notice_html(told), f"fetch-{id}"

        target = gr.Textbox(visible=False)
        button.click(write, None, [link, said, target], **LIGHT).then(None, [target], None, js=FETCH)


def _model(store: JudgmentStore, run: Path, folder: Path) -> None:
    """The same for the model, which the tuner has to write."""
    wanted = Requests(store, "export_model")
    with gr.Column(elem_classes="z-file"):
        button, said = _card(
            "Tuned model",
            "A zip file with weights and tokenizer, for AutoModelForCausalLM.from_pretrained.",
            "model",
        )
        link = gr.DownloadButton(visible="hidden", elem_id="fetch-model")
        asked, target = gr.Number(0, visible=False, precision=0), gr.Textbox(visible=False)
        timer = gr.Timer(SECONDS, active=False)

        def ask() -> tuple[Any, ...]:
            return wanted.ask(), gr.Timer(active=True), notice_html(wanted.waiting(WRITING))

        def look(request: float | None) -> tuple[Any, ...]:
            """Returns the timer, the link, the message, and which link to click."""
            try:
                result = wanted.answer(int(request)) if request else {}
                if result is None:
                    return gr.skip(), gr.skip(), notice_html(wanted.waiting(WRITING)), ""
                if not result:
                    return gr.Timer(active=False), gr.skip(), gr.skip(), ""
                file = _served(Path(str(result["path"])), run, folder)
            except (ValueError, OSError) as error:
                return gr.Timer(active=False), gr.skip(), notice_html(str(error)), ""
            return gr.Timer(active=False), str(file), notice_html("The model is ready."), "fetch-model"

        button.click(ask, None, [asked, timer, said], **LIGHT)
        timer.tick(look, [asked], [timer, link, said, target], **LIGHT).then(None, [target], None, js=FETCH)


def _card(title: str, about: str, id: str) -> tuple[gr.Button, gr.HTML]:
    html_block(f'<div class="z-export"><h2>{text(title)}</h2><p>{text(about)}</p></div>')
    button = gr.Button(f"Download {title.lower()}", elem_id=f"export-{id}")
    return button, html_block(elem_id=f"said-{id}")


def _new_file(folder: Path, name: str) -> Path:
    """A place of its own for each download, because people may click at the same time. Old ones are removed."""
    for old in folder.glob("download-*"):
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="download-", dir=folder)) / name


def _preferences(store: JudgmentStore, folder: Path) -> tuple[Path, str]:
    file = _new_file(folder, "preferences.jsonl")
    written = write_preferences(store, file)
    if not written.preferences:
        raise ValueError(f"There are no preferences yet: {written.ties} ties, {written.abstained} without an opinion.")
    return (
        file,
        f"{written.preferences} preferences. Left out: {written.ties} ties, {written.abstained} without an opinion.",
    )


def _events(store: JudgmentStore, folder: Path) -> tuple[Path, str]:
    file = _new_file(folder, "judgments.jsonl")
    return file, f"{write_events(store, file)} events."


def _trajectory(run: Path, folder: Path) -> tuple[Path, str]:
    source = run / "trajectory.zorl"
    if not source.is_file():
        raise ValueError("There is no trajectory yet: no step has been made.")
    return Path(shutil.copy(source, _new_file(folder, "trajectory.zorl"))), ""


def _served(path: Path, run: Path, folder: Path) -> Path:
    """A copy of the file that the tuner wrote, where Gradio serves it.

    Raises:
        ValueError: the file is not in the run's folder.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"The model was written to {path}, which is not in the run's folder {run}: copy it from there."
        )
    return Path(shutil.copy(path, _new_file(folder, path.name)))
