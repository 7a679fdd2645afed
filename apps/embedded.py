"""The model that ships with zorl, so that its examples run without a network."""

from __future__ import annotations

from pathlib import Path

# A causal language model pretrained on generated film reviews (apps/pretrain_reviewer.py).
REVIEWER = Path(__file__).parent / "reviewer"
