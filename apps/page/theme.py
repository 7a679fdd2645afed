"""Colours and fonts: paper, ink and one accent colour. Fonts are those of the system, so that nothing is downloaded."""

from __future__ import annotations

from gradio.themes import Base
from gradio.themes.utils import colors, sizes

SANS = (
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Base:
    """The theme. The colours of answers and charts are in page.css."""
    base = Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.stone,
        font=SANS,
        font_mono=MONO,
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
    )
    return base.set(
        body_background_fill="#f8f7f4",
        body_background_fill_dark="#15171a",
        body_text_color="#1f2328",
        body_text_color_dark="#e8e6e1",
        body_text_color_subdued="#5c6066",
        body_text_color_subdued_dark="#a3a7ad",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1d2024",
        background_fill_secondary="#f8f7f4",
        background_fill_secondary_dark="#15171a",
        border_color_primary="#e2dfd8",
        border_color_primary_dark="#33373d",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1d2024",
        block_border_color="#e2dfd8",
        block_border_color_dark="#33373d",
        block_label_text_color="#5c6066",
        block_label_text_color_dark="#a3a7ad",
        block_title_text_weight="600",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1d2024",
        input_border_color="#c9c5bc",
        input_border_color_dark="#4a4f57",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#2dd4bf",
        button_primary_background_fill_hover_dark="#5eead4",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#0b2724",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f1efea",
        button_secondary_background_fill_dark="#262a2f",
        button_secondary_background_fill_hover_dark="#30353b",
        button_secondary_border_color="#d5d1c8",
        button_secondary_border_color_dark="#41464d",
        button_border_width="1px",
        button_large_text_weight="600",
        link_text_color="#0f766e",
        link_text_color_dark="#5eead4",
    )
