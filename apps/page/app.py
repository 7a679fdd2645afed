"""The page: its head and four tabs, and how it is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.page import api, export_tab, judge_tab, progress_tab, try_tab
from zorl.apps.page.components import html_block
from zorl.apps.page.desk import Desk
from zorl.apps.page.markup import text
from zorl.apps.page.security import Guard, is_local
from zorl.apps.page.theme import theme
from zorl.rewards.judgment_records import LONGEST_NAME
from zorl.rewards.judgment_store import JudgmentStore

NAME_KEY, NAME_SECRET = "zorl-rater", "not a secret"  # where the browser stores the rater's name


class Page:
    """The page of one run.

    Args:
        store: the run's judgments.
        settings: the settings of the run.
        run: the run's folder.
        scratch: an empty folder for the files that people download.
        auth: says whether a name and a password are valid; None: nobody signs in.
        guidelines: guidelines for the raters; None: those that ship with zorl.
        page_only: whether `zorl train` asks the questions. It keeps steps, model and trajectory to itself, so the page leaves
            out what needs them.
    """

    def __init__(
        self,
        store: JudgmentStore,
        settings: JudgeSettings,
        run: Path,
        scratch: Path,
        *,
        auth: Callable[[str, str], bool] | None = None,
        guidelines: str | None = None,
        page_only: bool = False,
    ) -> None:
        self.auth = auth
        self.scratch = scratch
        self.desk = Desk(store, logins=auth is not None)
        guidelines = _text("guidelines.txt") if guidelines is None else guidelines
        kept = int(export_tab.KEPT)  # Gradio serves copies of what people download
        with gr.Blocks(
            title=f"zorl judge: {run.name}", analytics_enabled=False, delete_cache=(kept, kept)
        ) as self.blocks:
            api.build(self.desk)  # first, so that these endpoints get their plain names
            name, remembered = self._head(run, settings)
            with gr.Tabs() as tabs:
                with gr.Tab("Judge", id="judge"):
                    judge_tab.build(self.blocks, self.desk, guidelines, name, remembered, steps=not page_only)
                with gr.Tab(progress_tab.TITLE, id="progress"):
                    progress_tab.build(tabs, store, steps=not page_only)
                if not page_only:
                    with gr.Tab("Try it", id="try"):
                        try_tab.build(store, settings.prompts[0])
                with gr.Tab("Export", id="export"):
                    export_tab.build(store, run, scratch, model=not page_only)

    def open(self, host: str = "127.0.0.1", port: int | None = None) -> str:
        """Serves the page, in its own threads, and returns its address.

        Raises:
            OSError: the port is in use, or the host is not an address of this machine.
        """
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            auth=self.auth,
            auth_message="Your verdicts are kept under the name that you sign in with.",
            theme=theme(),
            # Not as `css`: Gradio would write every rule twice, under its own selector.
            head=f"<style>{_text('page.css')}</style><script>{_text('keys.js')}</script>",
            app_kwargs={"middleware": [Middleware(Guard, local=is_local(host))]},
            # Only files in the scratch folder are served, whatever the environment says.
            allowed_paths=[str(self.scratch)],
            max_file_size=1,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            num_workers=0,
            enable_monitoring=False,
            run_history=False,
            # Gradio's panels of settings and of the API speak of much that this page does not have; see docs/judging.md.
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            max_threads=64,
        )
        return str(address)

    def close(self) -> None:
        """Stops serving."""
        self.blocks.close(verbose=False)

    def _head(self, run: Path, settings: JudgeSettings) -> tuple[gr.Textbox, gr.BrowserState | None]:
        """Brand and run on the left, the rater's name on the right."""
        model = Path(settings.model).name
        with gr.Row(elem_id="head"):
            html_block(f'<div class="z-brand"><b>zorl judge</b><span>{text(run.name)} · {text(model)}</span></div>')
            name = gr.Textbox(
                label="Judging as",
                elem_id="who",
                max_length=LONGEST_NAME,
                max_lines=1,
                interactive=self.auth is None,
                scale=0,
                min_width=240,
            )
        remembered = None if self.auth else gr.BrowserState(None, storage_key=NAME_KEY, secret=NAME_SECRET)
        return name, remembered


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
