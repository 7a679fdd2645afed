"""Building blocks of the tabs: blocks of HTML, and how handlers are called."""

from __future__ import annotations

from typing import Any

import gradio as gr

# For handlers that only read or write the store: answered at once, any number in parallel, not part of the API.
LIGHT: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}


def html_block(html: str = "", elem_id: str | None = None) -> gr.HTML:
    """HTML that is styled by page.css only. It must come from `zorl.apps.page.markup`, which escapes everything."""
    return gr.HTML(html, elem_id=elem_id, apply_default_css=False, js_on_load=None)
