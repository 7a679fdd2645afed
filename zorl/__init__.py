"""zorl: tune language models with forward passes only, on objectives that have no gradient.

SPSA needs no loss, only the difference of two. Accuracy, F1, any Python callable or a person's choice will do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zorl.config import MeZOConfig as MeZOConfig
    from zorl.mezo import MeZO as MeZO
    from zorl.predictor import Predictor as Predictor
    from zorl.prompts import Prompt as Prompt
    from zorl.trainer import MeZOTrainer as MeZOTrainer

__version__ = "0.1.0"

# Loaded on first use (PEP 562): importing transformers' Trainer takes seconds, and the optimizer does not need it.
_HOME = {
    "MeZO": "zorl.mezo", "MeZOConfig": "zorl.config", "MeZOTrainer": "zorl.trainer", "Predictor": "zorl.predictor",
    "Prompt": "zorl.prompts",
}  # fmt: skip
__all__ = ["MeZO", "MeZOConfig", "MeZOTrainer", "Predictor", "Prompt", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zorl' has no attribute {name!r}")
