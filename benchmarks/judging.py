"""How fast the judging page is, and whether it loses a verdict.

    python benchmarks/judging.py latency     # a browser and nine programs judge while the model is tuned; needs chromium
    python benchmarks/judging.py load        # 50 raters, 10,000 verdicts, everything killed again and again
    python benchmarks/judging.py report      # docs/judging.md from the results

Both run `zorl judge` as a user would, on the embedded model, and use its public API over plain HTTP. `load` notes every verdict
that was acknowledged; at the end each of them must be in the store, once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from common import machine
from tqdm.auto import tqdm

from zorl.rewards.judgment_store import JudgmentStore

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
THINKING = 3.0  # seconds that a program waits before a verdict, on average: as quick as people at their best


class Page:
    """`zorl judge` in a process group of its own, on one port for all its lives."""

    def __init__(self, run: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "zorl.apps.cli", "judge", "--run", str(run), "--no_browser",
                        "--port", str(self.port), *flags]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the page answers."""
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"zorl judge did not start: {' '.join(self.command)}")

    def kill(self) -> None:
        """SIGKILL, as a power cut would. The tuner notices that it is alone."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@contextmanager
def serving(*flags: str) -> Iterator[tuple[Page, Path]]:
    run = Path(tempfile.mkdtemp()) / "run"
    page = Page(run, *flags)
    page.start()
    try:
        yield page, run
    finally:
        page.stop()
        shutil.rmtree(run.parent)


class Api:
    """The page's API. A call raises httpx.HTTPError where nobody answers, and `RefusedError` where the page says no."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.Client(timeout=30)

    def __call__(self, name: str, *data: Any) -> Any:
        answer = self.client.post(f"{self.url}/gradio_api/run/{name}", json={"data": list(data)})
        told = answer.json()
        if answer.status_code != 200:
            raise RefusedError(str(told.get("error") or told))
        return told["data"][0]


class RefusedError(Exception):
    """What the page said in place of taking a verdict."""


# --- latency ----------------------------------------------------------------------------------------------------------


def latency(raters: int, clicks: int) -> dict[str, Any]:
    """Milliseconds from a key to the next pair on screen, and from a verdict posted to the next pair received."""
    from playwright.sync_api import sync_playwright

    stop, posted = threading.Event(), []

    def program(name: str) -> None:
        api, generator, pair = Api(page.url), random.Random(name), None
        while not stop.is_set():
            if pair is None:
                pair = api("next_pair", name)
                time.sleep(0.05)
                continue
            time.sleep(generator.uniform(0, 2 * THINKING))
            began = time.perf_counter()
            pair = api("vote", name, pair["showing"], generator.choice(["first", "second"]))
            posted.append(1e3 * (time.perf_counter() - began))

    on_screen: list[float] = []
    with serving("--prompts_per_step", "8") as (page, run), sync_playwright() as playwright:
        threads = [threading.Thread(target=program, args=(f"program {i}",)) for i in range(raters - 1)]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(CHROMIUM))
        tab = browser.new_page()
        tab.goto(page.url)
        pair = "#pair [data-showing]"
        tab.wait_for_selector(pair, timeout=120_000)
        for thread in threads:
            thread.start()
        changed = """old => new Promise(done => { const began = performance.now(); const look = () => {
            const now = document.querySelector('#pair [data-showing]');
            if (now && now.dataset.showing !== old) done(performance.now() - began); else requestAnimationFrame(look); };
            document.getElementById('vote-a').click(); look(); })"""
        for _ in tqdm(range(clicks), desc="clicks"):
            time.sleep(0.5)
            tab.wait_for_selector(pair, timeout=120_000)
            on_screen.append(tab.evaluate(changed, tab.get_attribute(pair, "data-showing")))
        stop.set()
        for thread in threads:
            thread.join()
        browser.close()
        steps = len(JudgmentStore(run / "judgments.sqlite").steps())
    return {
        "raters": raters, "clicks": clicks, "steps_meanwhile": steps, "screen_ms": quantiles(on_screen),
        "api_ms": quantiles(posted), "machine": machine(),
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"median": round(cuts[49], 1), "p95": round(cuts[94], 1), "largest": round(max(values), 1)}


# --- load -------------------------------------------------------------------------------------------------------------


def load(raters: int, verdicts: int, kills: int) -> dict[str, Any]:
    """Everything is killed `kills` times while the verdicts come in; then the store is held against what was acknowledged."""
    stop, lock = threading.Event(), threading.Lock()
    acknowledged: dict[int, str] = {}
    bar = tqdm(total=verdicts, desc="verdicts")

    def program(name: str) -> None:
        api, generator, pair, choice = Api(page.url), random.Random(name), None, ""
        while not stop.is_set():
            try:
                if pair is None:
                    pair = api("next_pair", name)
                    choice = generator.choice(["first", "second", "tie", "both bad", "abstain"])
                    stop.wait(0.05 if pair is None else 0)
                    continue
                voted = pair["showing"]
                pair = api("vote", name, voted, choice)
            except RefusedError:  # the pair was closed while the page was away
                pair = None
                continue
            except (
                httpx.HTTPError,
                ValueError,
            ):  # killed in mid-answer: the same verdict is posted again, and must count once
                time.sleep(0.2)
                continue
            choice = generator.choice(["first", "second", "tie", "both bad", "abstain"])
            with lock:
                acknowledged[voted] = name
                bar.update()
                if len(acknowledged) >= verdicts:
                    stop.set()

    began = time.monotonic()
    flags = ("--prompts_per_step", "64", "--votes_per_pair", "5", "--max_completion_length", "8", "--max_drift", "0")
    with serving(*flags) as (page, run):
        threads = [threading.Thread(target=program, args=(f"rater {i}",)) for i in range(raters)]
        for thread in threads:
            thread.start()
        generator = random.Random(0)
        for i in range(kills):
            while len(acknowledged) < verdicts * (i + generator.random()) / kills and not stop.is_set():
                time.sleep(0.02)
            page.kill()
            page.start()
        stop.wait()
        for thread in threads:
            thread.join()
        page.kill()
        return {
            "raters": raters, "verdicts": len(acknowledged), "kills": kills + 1,
            "seconds": round(time.monotonic() - began), **audit(run, acknowledged), "machine": machine(),
        }  # fmt: skip


def audit(run: Path, acknowledged: dict[int, str]) -> dict[str, int]:
    """What the store says of the verdicts that were acknowledged."""
    store = JudgmentStore(run / "judgments.sqlite")
    kept = {s.showing: s for s in store.showings() if s.choice is not None}
    votes = Counter(event.showing for event in store.events() if event.action == "vote")
    used: Counter[tuple[int, str]] = Counter()
    for step in store.steps():
        if store.probe(step.probe).state == "applied":
            used.update((vote.pair, vote.rater) for vote in store.close_probe(step.probe) if vote.rater)
    return {
        "lost": sum(showing not in kept or kept[showing].rater != name for showing, name in acknowledged.items()),
        "counted_twice": sum(n > 1 for n in votes.values()) + sum(n > 1 for n in used.values()),
        "steps": len(store.steps()),
        "verdicts_in_steps": used.total(),
    }


def report() -> str:
    lines = [
        "# The judging page",
        "",
        "Written by `benchmarks/judging.py`, which runs `zorl judge` on the embedded model.",
    ]
    if (path := RESULTS / "judging_latency.json").exists():
        found = json.loads(path.read_text())
        lines += [
            "",
            "## How long a rater waits",
            "",
            f"{found['raters']} raters at once, one of them in Chromium and the others over the API, each of these thinking for "
            f"about {THINKING:g} s; meanwhile the model made {found['steps_meanwhile']} steps. Machine: {found['machine']}; "
            "browser, page, model and programs share it.",
            "",
            "| from … to … | median | 95th percentile | largest |",
            "|---|---|---|---|",
        ]
        for label, key in (("click … next pair on screen", "screen_ms"), ("verdict posted … next pair", "api_ms")):
            q = found[key]
            lines.append(f"| {label} | {q['median']:.0f} ms | {q['p95']:.0f} ms | {q['largest']:.0f} ms |")
    if (path := RESULTS / "judging_load.json").exists():
        found = json.loads(path.read_text())
        lines += [
            "",
            "## Whether a verdict is lost",
            "",
            f"{found['raters']} raters posted {found['verdicts']} verdicts over the API in {found['seconds']} s, while page "
            f"and model were killed with SIGKILL {found['kills']} times. Of the acknowledged verdicts **{found['lost']}** were "
            f"lost and **{found['counted_twice']}** counted twice; {found['verdicts_in_steps']} made {found['steps']} steps, "
            f"the rest were comparisons, repeats, or waited for their step. Machine: {found['machine']}.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("latency", "load", "report"))
    parser.add_argument("--raters", type=int, help="default: 10 for latency, 50 for load")
    parser.add_argument("--clicks", type=int, default=100, help="of the browser, for latency (default: 100)")
    parser.add_argument("--verdicts", type=int, default=10_000, help="for load (default: 10000)")
    parser.add_argument("--kills", type=int, default=10, help="for load (default: 10)")
    options = parser.parse_args()
    if options.part != "report":
        result = (
            latency(options.raters or 10, options.clicks)
            if options.part == "latency"
            else load(options.raters or 50, options.verdicts, options.kills)
        )
        print(json.dumps(result, indent=1))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"judging_{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    document = ROOT / "docs" / "judging.md"
    _, heading, by_hand = document.read_text(encoding="utf-8").partition("\n## Across machines\n")
    document.write_text(report().rstrip() + "\n" + heading + by_hand, encoding="utf-8")


if __name__ == "__main__":
    main()
