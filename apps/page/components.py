"""What the tabs are built from: HTML of our own, and how handlers are called."""

from __future__ import annotations

from typing import Any

import gradio as gr

# Handlers that read or write the store and nothing else: answered at once, any number side by side, no part of the API.
LIGHT: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}


def html_block(html: str = "", elem_id: str | None = None) -> gr.HTML:
    """HTML in the style of page.css alone. It must be made by `zorl.apps.page.markup`, which leaves nothing unescaped."""
    return gr.HTML(html, elem_id=elem_id, apply_default_css=False, js_on_load=None)
