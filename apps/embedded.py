"""The model that ships with zorl, so that its examples run without a network."""

from __future__ import annotations

from pathlib import Path

REVIEWER = (
    Path(__file__).parent / "reviewer"
)  # a causal LM that read generated film reviews (apps/pretrain_reviewer.py)
