"""The page over HTTP: its API, and whom it lets in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from judging_pages import get, served_page
from starlette.datastructures import Headers

from zorl.apps.page.security import is_foreign, is_local, read_users, sign_in
from zorl.probe import Choice
from zorl.rewards.judgment_store import JudgmentStore


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, pretend_tuner: Any) -> Iterator[tuple[str, JudgmentStore]]:
    folder = tmp_path_factory.mktemp("served")
    with served_page(folder, pretend_tuner) as (address, store):
        yield address, store


def test_the_api_takes_verdicts_from_another_program(served: tuple[str, JudgmentStore]) -> None:
    address, store = served
    client = Client(address, verbose=False)
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/next_pair",
        "/vote",
        "/undo",
        "/progress",
    }
    pair = client.predict("robot", api_name="/next_pair")
    assert set(pair) == {"showing", "prompt", "first", "second"}
    assert client.predict("robot", api_name="/next_pair") == pair
    following = client.predict("robot", pair["showing"], "both bad", api_name="/vote")
    assert following["showing"] != pair["showing"]
    assert client.predict("robot", api_name="/progress")["verdicts"] == 1
    assert client.predict("robot", api_name="/undo") == pair
    client.predict("robot", pair["showing"], "tie", api_name="/vote")
    (judged,) = [record for record in store.showings() if record.choice is not None]
    assert (judged.rater, judged.choice) == ("robot", Choice.TIE)


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/vote", ["robot", 10**6, "tie"], "showing 1000000 was not given to rater"),
        (
            "/vote",
            ["robot", 1, "left"],
            "choice must be one of 'first', 'second', 'tie', 'both bad', 'abstain', got 'left'",
        ),
        ("/next_pair", [""], "A rater needs a name"),
        ("/next_pair", ["x" * 41], "a name must have 1 to 40"),
        ("/undo", ["somebody new"], "You have nothing to undo"),
    ],
)
def test_the_api_says_in_a_sentence_what_does_not_fit(
    served: tuple[str, JudgmentStore], endpoint: str, arguments: list[Any], message: str
) -> None:
    with pytest.raises(AppError, match=message):
        Client(served[0], verbose=False).predict(*arguments, api_name=endpoint)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/proxy=http://example.com/",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/gradio_api/file={run}/judgments.sqlite",
        "/gradio_api/file={cwd}/pyproject.toml",
    ],
)
def test_no_file_of_the_machine_can_be_read(served: tuple[str, JudgmentStore], path: str) -> None:
    address, store = served
    run = Path(str(store._database.name)).parent
    answer = get(address, path.format(run=run, cwd=Path.cwd()))
    assert answer.status_code in (400, 403, 404), answer.text
    assert "root:" not in answer.text


def test_nothing_can_be_uploaded_and_no_other_site_is_asked_for_anything(served: tuple[str, JudgmentStore]) -> None:
    address, _ = served
    files = {"files": ("x.txt", b"x")}
    assert httpx.post(f"{address}gradio_api/upload", files=files, trust_env=False).status_code == 404
    page = get(address, "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    config = get(address, "/config").json()
    assert config["run_history"] is False
    assert config["analytics_enabled"] is False


def test_another_name_for_this_machine_is_refused(served: tuple[str, JudgmentStore]) -> None:
    address, _ = served
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 403
    assert httpx.get(address, headers={"Host": "localhost:1"}, trust_env=False).status_code == 200


def test_where_there_are_passwords_nobody_gets_in_without_one(tmp_path: Path, pretend_tuner: Any) -> None:
    with served_page(tmp_path, pretend_tuner, auth=sign_in(None, {"ada": "secret"})) as (address, store):
        assert get(address, "/config").status_code == 401
        assert get(address, "/gradio_api/file=/etc/passwd").status_code == 401
        assert httpx.post(f"{address}gradio_api/queue/join", json={}, trust_env=False).status_code in (401, 422)
        for name, password in (("ada", "wrong"), ("bob", "secret"), ("", ""), ("ada", "")):
            data = {"username": name, "password": password}
            assert httpx.post(f"{address}login", data=data, trust_env=False).status_code in (400, 422)
        client = Client(address, auth=("ada", "secret"), verbose=False)
        pair = client.predict("", api_name="/next_pair")
        client.predict("ada", pair["showing"], "first", api_name="/vote")
        with pytest.raises(AppError, match="signed in as ada"):
            client.predict("bob", api_name="/next_pair")
        assert {record.rater for record in store.showings()} == {"ada"}


def test_another_site_cannot_vote_with_the_cookie_of_somebody_who_has_signed_in(
    tmp_path: Path, pretend_tuner: Any
) -> None:
    with served_page(tmp_path, pretend_tuner, auth=sign_in(None, {"ada": "secret"})) as (address, store):
        own = address.rstrip("/")
        with httpx.Client(base_url=address, trust_env=False) as browser:
            assert browser.post("login", data={"username": "ada", "password": "secret"}).status_code == 200
            pair = browser.post("gradio_api/run/next_pair", json={"data": ["ada"]}, headers={"Origin": own})
            vote = {"data": ["ada", pair.json()["data"][0]["showing"], "first"]}
            for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
                foreign = {"Origin": origin}
                answer = browser.post("gradio_api/run/vote", json=vote, headers=foreign)
                assert answer.status_code == 403, origin
                named = {**foreign, "X-Forwarded-Host": "evil.example", "Content-Type": "text/plain"}
                assert browser.post("gradio_api/run/vote", content=json.dumps(vote), headers=named).status_code == 403
            assert all(record.choice is None for record in store.showings())
            assert browser.post("gradio_api/run/vote", json=vote, headers={"Origin": own}).status_code == 200
            assert [str(record.choice) for record in store.showings() if record.choice is not None] == ["first"]


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        ("POST", {"host": "judge.example"}, False),  # no browser
        ("POST", {"host": "judge.example", "origin": "https://judge.example"}, False),
        # A proxy that drops the port.
        ("POST", {"host": "judge.example", "origin": "https://judge.example:8443"}, False),
        ("POST", {"host": "judge.example:7860", "origin": "http://judge.example:7860"}, False),
        ("POST", {"host": "localhost:7860", "origin": "http://localhost:3000"}, True),
        ("POST", {"host": "judge.example", "origin": "https://evil.example"}, True),
        ("POST", {"host": "judge.example", "origin": "null"}, True),
        # A proxy that knows the page by another name.
        ("POST", {"host": "10.0.0.7", "origin": "https://judge.example", "sec-fetch-site": "same-origin"}, False),
        ("POST", {"host": "judge.example", "origin": "https://judge.example", "sec-fetch-site": "cross-site"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),
        ("POST", {"host": "judge.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, False),
    ],
)
def test_who_is_another_site(method: str, headers: dict[str, str], foreign: bool) -> None:
    assert is_foreign(method, Headers(headers)) == foreign


def test_with_one_password_for_all_a_rater_chooses_a_name() -> None:
    check = sign_in("open sesame", {})
    assert check is not None
    assert check("anybody", "open sesame")
    assert not check("anybody", "open")
    assert not check("", "open sesame")
    assert not check("x" * 41, "open sesame")
    assert sign_in(None, {}) is None


def test_a_file_of_users_is_read_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_text("# raters\nada:se:cret\n\nbob:x\n")
    assert read_users(file) == {"ada": "se:cret", "bob": "x"}
    for content, message in (
        ("ada", "line 1: expected name:password"),
        ("ada:x\nada:y", "line 2: the name 'ada' occurs twice"),
        ("\n", "names nobody"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_users(file)


def test_only_this_machine_s_own_addresses_are_local() -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2")))
    assert not any(map(is_local, ("0.0.0.0", "192.168.1.2", "example.com", "127.0.0.1.example.com", "", "::")))
