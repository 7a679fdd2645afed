"""The judging page without a browser: its parts, and served on a free port."""

from __future__ import annotations

import gc
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.page.app import Page
from zorl.apps.page.desk import Desk
from zorl.rewards.judgment_store import JudgmentStore, NewPair, Progress, Showing

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> ![x](http://example.com/x.png) ${alert(1)} {{7*7}}"
TEXTS = [("the drama was", "truly witty .", "truly dull ."), ("the plot was", "far from flat .", "flat .")]


def progress(state: str = "waiting", message: str = "", **figures: int) -> Progress:
    counts = dict.fromkeys(
        ("steps", "votes_needed", "votes_given", "votes_skipped", "votes_held", "open_pairs", "verdicts", "raters"), 0
    )
    return Progress(**(counts | figures), can_undo=False, tuner={"state": state, "message": message})


def desk_of(folder: Path) -> Desk:
    store = JudgmentStore(folder / "judgments.sqlite", comparison_share=0, repeat_share=0)
    store.add_probe([NewPair(0, row, *text) for row, text in enumerate(TEXTS)], key="first")
    return Desk(store)


def shown(showing: Showing | None) -> Showing:
    assert showing is not None
    return showing


@contextmanager
def served_page(
    folder: Path, tuner: Any, auth: Callable[[str, str], bool] | None = None
) -> Iterator[tuple[str, JudgmentStore]]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Gradio leaves event loops to the garbage collector
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "scratch" / "served"))
        (folder / "run").mkdir()
        (folder / "scratch").mkdir()
        store = JudgmentStore(folder / "run" / "judgments.sqlite", comparison_share=0, repeat_share=0)
        tuner(folder / "run" / "judgments.sqlite", TEXTS).work()
        page = Page(store, JudgeSettings("m", ["the drama was"]), folder / "run", folder / "scratch", auth=auth)
        address = page.open(port=free_port())
        try:
            yield address, store
        finally:
            page.close()
            store.close()
            del page
            gc.collect()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(address: str, path: str) -> httpx.Response:
    """The path goes out as it is written: a browser would resolve its dots, an attacker does not."""
    request = httpx.Request("GET", address)
    request.url = request.url.copy_with(raw_path=path.encode())
    with httpx.Client(trust_env=False) as client:
        return client.send(request)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
