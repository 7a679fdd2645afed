"""The page in a real browser: Chromium, driven by Playwright, against texts that a made-up tuner feeds."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import socket
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from playwright.sync_api import Browser, Download, Page, expect, sync_playwright

import zorl.apps.page.app
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.page.security import sign_in
from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore, ShowingRecord

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1> ![x](http://example.com/x.png) ${window.hacked=1}"
TEXTS = [
    ("the drama was", "truly witty . it was a hit .", "truly dull . it was a flop ."),
    ("the plot was", "far from flat .", "flat ."),
    ("the score was", "superb .", "weak ."),
]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} to show the page in")


@dataclass(frozen=True)
class Site:
    """A page that is served, its store, and what works beside it."""

    address: str
    store: JudgmentStore
    run: Path
    tuner: Any
    browser: Browser

    @contextlib.contextmanager
    def visit(self, width: int = 1280, height: int = 844, dark: bool = False) -> Iterator[Page]:
        """A browser of its own, on the Judge tab with a pair in front of it. Leaving checks that nothing went wrong."""
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        context.set_default_timeout(10_000)
        page = context.new_page()
        errors: list[str] = []
        elsewhere: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda r: elsewhere.append(r.url) if not r.url.startswith((self.address, "data:", "blob:")) else None,
        )
        page.goto(self.address)
        try:
            yield page
            assert page.evaluate("window.hacked") is None
            assert errors == []
            assert elsewhere == []
        finally:
            context.close()

    def answered(self, rater: str) -> list[ShowingRecord]:
        return [record for record in self.store.showings() if record.rater == rater and record.choice is not None]

    def make_steps(self, count: int) -> None:
        """Verdicts of somebody who is not at a browser, until so many steps more are made."""
        rater = self.store.rater("robot")
        wanted = len(self.store.steps()) + count
        deadline = time.monotonic() + 20
        while len(self.store.steps()) < wanted:
            assert time.monotonic() < deadline, "no steps are made"
            pair = self.store.next_pair(rater)
            if pair is None:
                time.sleep(0.01)
            else:
                with contextlib.suppress(AlreadyClosed):
                    self.store.vote(pair.id, rater, Choice.FIRST)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def serve(
    folder: Path, browser: Browser, tuner: Any, texts: list[tuple[str, str, str]], **options: Any
) -> Iterator[Site]:
    run, scratch = folder / "run", folder / "scratch"
    run.mkdir()
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Gradio leaves event loops to the garbage collector
        patch.setenv("GRADIO_TEMP_DIR", str(scratch / "served"))
        store = JudgmentStore(run / "judgments.sqlite", repeat_share=0, comparison_share=0.3)
        made = tuner(run / "judgments.sqlite", texts, per_step=8)
        made.work()
        page = zorl.apps.page.app.Page(store, JudgeSettings("model", ["the drama was"]), run, scratch, **options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = page.open(port=port)
        try:
            yield Site(address, store, run, made, browser)
        finally:
            page.close()
            del page
            gc.collect()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, browser: Browser, pretend_tuner: Any) -> Iterator[Site]:
    with serve(tmp_path_factory.mktemp("site"), browser, pretend_tuner, TEXTS) as site:
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.05):
                site.tuner.work()

        beside = threading.Thread(target=work)
        beside.start()
        yield site
        stop.set()
        beside.join()


def test_people_judge_with_the_keyboard_tie_skip_and_take_back(site: Site) -> None:
    with site.visit() as page:
        name = call_me(page, "ada")
        given = [
            ("a", "first"),
            ("t", "tie"),
            ("ArrowRight", "second"),
            ("x", "both bad"),
            ("s", "abstain"),
            ("B", "second"),
        ]
        for key, _ in given:
            press(page, key)
        assert [record.choice for record in site.answered(name)] == [choice for _, choice in given]
        before = shown(page)
        page.keyboard.press("u")
        expect(page.locator("#notice")).to_contain_text("Verdict undone")
        assert shown(page) != before
        assert len(site.answered(name)) == len(given) - 1


def test_the_buttons_do_what_their_keys_do_and_say_so(site: Site) -> None:
    with site.visit() as page:
        name = call_me(page, "bea")
        for label in ("A is better", "Tie", "Both bad", "B is better", "Skip"):
            now = shown(page)
            button = page.get_by_role("button", name=re.compile(f"^{label}"))
            assert button.get_attribute("aria-keyshortcuts")
            assert button.evaluate("e => getComputedStyle(e, '::after').content").strip('"')
            button.click()
            expect(page.locator("[data-showing]")).not_to_have_attribute("data-showing", now)
        choices = [record.choice for record in site.answered(name)]
        assert choices == ["first", "tie", "both bad", "second", "abstain"]


def test_a_reload_in_mid_pair_brings_the_same_pair_in_the_same_order(site: Site) -> None:
    with site.visit() as page:
        call_me(page, "cy")
        press(page, "a")
        before = (shown(page), page.locator(".z-a .z-text").inner_text(), page.locator(".z-b .z-text").inner_text())
        page.reload()
        expect(page.locator("#who input")).to_have_value("cy")
        page.wait_for_selector("[data-showing]")
        after = (shown(page), page.locator(".z-a .z-text").inner_text(), page.locator(".z-b .z-text").inner_text())
        assert after == before


def test_a_second_rater_has_pairs_of_their_own(tmp_path: Path, browser: Browser, pretend_tuner: Any) -> None:
    served = serve(tmp_path, browser, pretend_tuner, TEXTS)  # afresh: nobody has left with a pair in front of them
    with served as site, site.visit() as ada, site.visit() as bob:
        for page in (ada, bob):
            page.wait_for_selector("[data-showing]")
        assert ada.locator("#who input").input_value() != bob.locator("#who input").input_value()
        call_me(ada, "dora")
        call_me(bob, "eve")
        assert shown(ada) != shown(bob)
        press(ada, "a")
        press(bob, "b")
        assert [record.choice for record in site.answered("dora")] == ["first"]
        assert [record.choice for record in site.answered("eve")] == ["second"]
        pairs = {record.pair for name in ("dora", "eve") for record in site.answered(name)}
        assert len(pairs) == 2


def test_keys_are_letters_while_somebody_writes_and_nothing_on_other_tabs(site: Site) -> None:
    with site.visit() as page:
        call_me(page, "flo")
        page.locator("#who input").focus()
        page.keyboard.type("bats")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#who input")).to_have_value("flobats")
        page.get_by_role("tab", name="Try it").click()
        page.locator("body").press("a")
        page.wait_for_timeout(300)
        assert site.answered("flo") == site.answered("flobats") == []


def test_keys_are_verdicts_again_after_a_click_on_the_tab_and_after_a_name(site: Site) -> None:
    with site.visit() as page:
        name = call_me(page, "ann")  # ends with Enter
        press(page, "a")
        expect(page.locator("#who input")).to_have_value("ann")
        page.get_by_role("tab", name="Judge").click()
        press(page, "b")
        page.keyboard.press("ArrowRight")  # on a tab the arrows belong to the tabs
        page.wait_for_timeout(300)
        assert [record.choice for record in site.answered(name)] == ["first", "second"]


def test_a_key_pressed_twice_is_one_verdict_on_what_was_seen(site: Site) -> None:
    with site.visit() as page:
        name = call_me(page, "gus")
        now = shown(page)
        page.evaluate("for (const id of ['vote-a', 'vote-b', 'vote-a']) document.getElementById(id).click()")
        expect(page.locator("[data-showing]")).not_to_have_attribute("data-showing", now)
        page.wait_for_timeout(300)
        assert [(str(record.showing), record.choice) for record in site.answered(name)] == [(now, "first")]


def test_a_verdict_that_comes_too_late_is_explained(site: Site) -> None:
    with site.visit() as page:
        name = call_me(page, "hal")
        pair = next(record.pair for record in site.store.showings() if str(record.showing) == shown(page))
        now = shown(page)
        for probe in site.store.open_probes():
            site.store.withdraw(probe.id)
        site.tuner.ahead.clear()
        page.keyboard.press("a")
        expect(page.locator("#notice")).to_contain_text("This pair is already closed")
        expect(page.locator("[data-showing]")).not_to_have_attribute("data-showing", now)
        assert pair not in {record.pair for record in site.answered(name)}


def test_a_pair_that_is_gone_makes_room_for_the_next_which_takes_no_key_meant_for_it(
    tmp_path: Path, browser: Browser, pretend_tuner: Any
) -> None:
    with serve(tmp_path, browser, pretend_tuner, TEXTS) as site, site.visit() as page:
        call_me(page, "eve")
        first = page.locator("[data-showing]").get_attribute("data-showing")
        probe, *_ = site.store.open_probes()
        site.store.withdraw(probe.id)
        page.wait_for_function(
            "(was) => { const now = document.querySelector('[data-showing]')?.dataset.showing; return now && now !== was; }",
            arg=first,
        )
        page.keyboard.press("a")  # at once: nobody has read it
        expect(page.locator("#notice")).to_contain_text("it was withdrawn because the model has changed since")
        page.wait_for_timeout(1000)
        assert site.store.progress().verdicts == 0
        page.keyboard.press("a")
        expect(page.locator("#notice p")).to_have_count(0)
        assert site.store.progress().verdicts == 1


def test_a_store_that_does_not_answer_is_said_until_it_does(
    tmp_path: Path, browser: Browser, pretend_tuner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the judgment store 'postgresql://server/x' does not answer")

    with serve(tmp_path, browser, pretend_tuner, TEXTS) as site, site.visit() as page:
        call_me(page, "eve")
        with monkeypatch.context() as outage:
            for method in ("keep", "vote", "next_pair", "progress"):
                outage.setattr(type(site.store), method, down)
            page.keyboard.press("a")
            expect(page.locator("#notice")).to_contain_text("The judgments cannot be reached at the moment.")
            assert "postgresql" not in page.content()
        expect(page.locator("#notice p")).to_have_count(0)
        page.wait_for_timeout(3100)  # until the same verdict may be given again
        page.keyboard.press("a")
        page.wait_for_function("document.querySelector('#status')?.textContent.includes('1 of')")
        assert site.store.progress().verdicts == 1


def test_a_name_given_later_takes_the_pair_along(tmp_path: Path, browser: Browser, pretend_tuner: Any) -> None:
    with serve(tmp_path, browser, pretend_tuner, TEXTS) as site, site.visit() as page:
        page.wait_for_selector("[data-showing]")
        before = page.locator("#pair .z-prompt").inner_text()
        call_me(page, "gus")
        page.wait_for_function("localStorage.getItem('zorl-rater') !== null")
        page.wait_for_timeout(500)
        assert page.locator("#pair .z-prompt").inner_text() == before
        assert site.store.progress(site.store.rater("hal")).votes_held == 1, "and nobody else holds one"


def test_the_keys_can_be_switched_off_and_letters_of_other_alphabets_do(site: Site) -> None:
    with site.visit() as page:
        call_me(page, "ida")
        showing = page.locator("[data-showing]")
        first = str(showing.get_attribute("data-showing"))
        page.get_by_label("Keyboard shortcuts").uncheck()
        page.keyboard.press("a")
        page.reload()
        page.wait_for_selector("[data-showing]")
        page.keyboard.press("a")
        page.wait_for_timeout(300)
        assert showing.get_attribute("data-showing") == first
        assert page.locator("#vote-a").get_attribute("aria-keyshortcuts") is None
        page.get_by_label("Keyboard shortcuts").check()
        page.evaluate(
            "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ф', code: 'KeyA', bubbles: true}))"
        )
        expect(showing).not_to_have_attribute("data-showing", first)


def test_a_screen_reader_is_told_of_the_new_pair(site: Site) -> None:
    with site.visit() as page:
        call_me(page, "ida")
        press(page, "t")
        announcer = page.get_by_role("status").filter(has_text="New pair")
        expect(announcer).to_have_text(re.compile(r"\. Answer B: .*\.$"))
        assert ".." not in announcer.inner_text()
        expect(announcer).to_contain_text(page.locator(".z-a .z-text").inner_text())
        assert announcer.get_attribute("aria-live") == "polite"
        expect(page.get_by_role("progressbar")).to_have_attribute("aria-label", re.compile("Verdicts for step"))
        expect(page.get_by_role("region", name="Answer A")).to_be_visible()


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_in_light_and_in_dark(site: Site, dark: bool) -> None:
    with site.visit(width=390, dark=dark) as page:
        page.wait_for_selector("[data-showing]")
        for tab in ("Progress", "Try it", "Export", "Judge"):
            page.get_by_role("tab", name=tab).click()
            expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for id in ("vote-a", "vote-b", "vote-tie", "vote-bad", "vote-skip", "undo"):
            box = page.locator(f"#{id}").bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 844
            assert box["height"] >= 44
        red, green, blue = contrast(page, ".z-a .z-text")
        assert (red + green + blue > 380) == dark


def test_both_answers_begin_above_the_buttons_of_a_small_phone(
    tmp_path: Path, browser: Browser, pretend_tuner: Any
) -> None:
    long = [(" ".join(["a long prompt"] * 60), " ".join(["one answer"] * 60), " ".join(["another"] * 60))]
    served = serve(tmp_path, browser, pretend_tuner, long)
    with served as site, site.visit(width=375, height=667) as page:
        page.wait_for_selector("[data-showing]")
        bar = page.locator("#actions").bounding_box()
        assert bar is not None
        for side in "ab":
            text = page.locator(f".z-{side} .z-text").bounding_box()
            assert text is not None
            assert text["y"] + 50 <= bar["y"]  # two lines
        expect(page.locator("#who label > span")).to_be_visible()
        expect(page.locator(".z-bar")).to_be_visible()
        expect(page.locator(".z-status li", has_text="verdicts so far")).to_be_hidden()


def test_a_server_that_is_away_is_said_and_nothing_can_be_judged_until_it_is_back(
    tmp_path: Path, browser: Browser, pretend_tuner: Any
) -> None:
    served = serve(tmp_path, browser, pretend_tuner, TEXTS)
    with served as site, site.visit() as page:
        name = call_me(page, "jo")
        page.context.set_offline(True)
        page.keyboard.press("a")
        lost = page.get_by_role("alert").filter(has_text="The server cannot be reached.")
        expect(lost).to_have_text(
            "The server cannot be reached. Your last verdict was not saved; this page reconnects by itself."
        )
        for id in ("vote-a", "vote-skip", "undo"):
            expect(page.locator(f"#{id}")).to_have_attribute("aria-disabled", "true")
        page.context.set_offline(False)
        expect(lost).to_be_hidden()
        page.wait_for_selector("[data-showing]")
        expect(page.locator("#vote-a")).to_have_attribute("aria-disabled", "false")
        press(page, "b")
        assert [record.choice for record in site.answered(name)] == ["second"]


def test_the_charts_move_when_steps_are_made(site: Site) -> None:
    with site.visit() as page:
        page.wait_for_selector("[data-showing]")
        site.make_steps(2)
        page.get_by_role("tab", name="Progress").click()
        drift = page.get_by_role("figure", name=re.compile("^Drift"))
        expect(drift.locator(".z-curve")).to_have_count(1)
        before = drift.locator(".z-headline").inner_text()
        site.make_steps(3)
        expect(drift.locator(".z-headline")).not_to_have_text(before)
        expect(
            page.get_by_role("figure", name=re.compile("^Win rate")).locator(".z-band, .z-dot").first
        ).to_be_attached()
        expect(page.get_by_role("table", name="Raters").get_by_role("rowheader", name="robot")).to_be_visible()


def test_a_run_goes_back_after_a_question(site: Site) -> None:
    with site.visit() as page:
        site.make_steps(2)
        page.get_by_role("tab", name="Progress").click()
        asked: list[str] = []
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
        page.locator("#rewind-step input").fill("1")
        page.get_by_role("button", name="Go back to this step").click()
        expect(page.locator("#rewind-said")).to_contain_text("The model is back at step 1.")
        assert asked == ["Go back to step 1? The steps after it are undone, and their verdicts stay in the raw log."]
        for wrong in ("1000", "1.5", "-1", ""):
            page.locator("#rewind-step input").fill(wrong)
            page.get_by_role("button", name="Go back to this step").click()
            expect(page.locator("#rewind-said")).to_contain_text("choose a whole number from 0 to")
        assert len(asked) == 1  # nobody was asked about a step that does not exist


def test_a_prompt_of_one_s_own_is_answered_by_both_models(site: Site) -> None:
    with site.visit() as page:
        page.get_by_role("tab", name="Try it").click()
        page.get_by_role("textbox", name="Prompt").fill("the <i>hero</i>")
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("region", name="Starting model")).to_contain_text("the <i>hero</i> as it was")
        expect(page.get_by_role("region", name=re.compile("Current model, after step"))).to_contain_text(
            "<b>as it is</b>"
        )
        page.get_by_role("textbox", name="Prompt").fill("nothing")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#try-answers")).to_contain_text("try cannot be done")


def test_the_exports_load(site: Site, tmp_path: Path) -> None:
    site.make_steps(2)
    (site.run / "trajectory.zorl").write_bytes(b"a few bytes")
    with site.visit() as page:
        page.get_by_role("tab", name="Export").click()

        def fetch(what: str) -> Path:
            with page.expect_download() as waiting:
                page.get_by_role("button", name=f"Download {what}").click()
            download: Download = waiting.value
            download.save_as(tmp_path / download.suggested_filename)
            return tmp_path / download.suggested_filename

        preferences = load_dataset(
            "json", data_files=str(fetch("preferences")), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert preferences.column_names == ["prompt", "chosen", "rejected"]
        assert len(preferences) >= 4
        assert set(preferences["prompt"]) <= {prompt for prompt, _, _ in TEXTS}
        events = [json.loads(line) for line in fetch("raw log").read_text(encoding="utf-8").splitlines()]
        assert {"shown", "vote", "committed"} <= {event["action"] for event in events}
        assert fetch("trajectory").read_bytes() == b"a few bytes"
        with zipfile.ZipFile(fetch("tuned model")) as archive:
            assert archive.namelist() == ["config.json"]
        expect(page.locator("#said-preferences")).to_contain_text("preferences. Left out:")


def test_hostile_text_stays_text(tmp_path: Path, browser: Browser, pretend_tuner: Any) -> None:
    texts = [(f"prompt {HOSTILE}", f"one {HOSTILE}", f"two {HOSTILE}")]
    with serve(tmp_path, browser, pretend_tuner, texts, guidelines=f"Which? {HOSTILE}\n\n{HOSTILE}") as site:
        site.store.set_tuner("waiting", HOSTILE)
        with site.visit() as page:
            page.wait_for_selector("[data-showing]")
            assert page.locator(".z-prompt .z-text").inner_text() == f"prompt {HOSTILE}"
            seen = {page.locator(f".z-{side} .z-text").inner_text() for side in "ab"}
            assert seen == {f"one {HOSTILE}", f"two {HOSTILE}"}
            assert page.locator(".z-pair img, .z-pair a, .z-pair script, #guidelines img").count() == 0
            call_me(page, "<b>x</b>")
            press(page, "a")
            page.get_by_role("tab", name="Progress").click()
            expect(page.get_by_role("rowheader", name="<b>x</b>")).to_be_visible()


def test_raters_sign_in_where_there_are_passwords(tmp_path: Path, browser: Browser, pretend_tuner: Any) -> None:
    check = sign_in(None, {"ada": "secret"})
    with serve(tmp_path, browser, pretend_tuner, TEXTS, auth=check) as site, site.visit() as page:
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name=re.compile("log ?in", re.IGNORECASE)).click()
        page.wait_for_selector("[data-showing]")
        expect(page.locator("#who input")).to_have_value("ada")
        expect(page.locator("#who input")).to_be_disabled()
        press(page, "b")
        assert [record.choice for record in site.answered("ada")] == ["second"]


def call_me(page: Page, name: str) -> str:
    """Gives the rater a name, and waits for their first pair."""
    page.wait_for_selector("[data-showing]")
    now = shown(page)
    page.locator("#who input").fill(name)
    page.locator("#who input").press("Enter")
    expect(page.locator("[data-showing]")).not_to_have_attribute("data-showing", now)
    return name


def shown(page: Page) -> str:
    """Id of the showing on the screen."""
    return str(page.locator("[data-showing]").get_attribute("data-showing"))


def press(page: Page, key: str) -> None:
    """Judges by a key, and waits for the next pair."""
    now = shown(page)
    page.keyboard.press(key)
    expect(page.locator("[data-showing]")).not_to_have_attribute("data-showing", now)


def contrast(page: Page, selector: str) -> tuple[int, int, int]:
    """The colour of a text."""
    red, green, blue = re.findall(r"\d+", page.locator(selector).evaluate("e => getComputedStyle(e).color"))[:3]
    return int(red), int(green), int(blue)
