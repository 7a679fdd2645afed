"""Who may see the page, and what it may load."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zorl.rewards.judgment_records import LONGEST_NAME
from zorl.text_files import read_text

# Gradio's front end consists of inline scripts and functions built from text; anything not served by the page is refused.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
# Routes of Gradio that this page does not need: uploads, and fetching from other machines.
CLOSED = (
    "/gradio_api/upload",
    "/gradio_api/proxy=",
    "/gradio_api/file=http",
    "/gradio_api/stream",
    "/proxy=",
    "/upload",
)


class Guard:
    """ASGI middleware: sets a strict Content-Security-Policy and refuses unused routes, requests from other sites and, if the
    page is served on this machine's own address, any other host name.

    The host name is checked because another site can point its own name at 127.0.0.1 (DNS rebinding); the browser would
    then treat the page as part of that site. Other sites are refused because a browser sends the cookie of somebody who
    has signed in along with their requests.
    """

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app = app
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.local and not is_local(_host(Headers(scope=scope).get("host", ""))):
            await PlainTextResponse("This page can only be opened as localhost.", 403)(scope, receive, send)
            return
        if is_foreign(scope["method"], Headers(scope=scope)):
            await PlainTextResponse("This page does not accept requests from other sites.", 403)(scope, receive, send)
            return
        if scope["path"].startswith(CLOSED):
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, send_guarded)


def is_foreign(method: str, headers: Headers) -> bool:
    """Whether another site's page makes the request, according to the browser. Links to this page may be followed from anywhere.

    Browsers say so in `Sec-Fetch-Site`, which no script can change, nor a proxy that knows the page by another name. On an
    unencrypted connection browsers leave it out; then the request's origin must be the requested host.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        follows_a_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not follows_a_link
    origin = headers.get("origin")
    if origin is None:
        return False
    asking = urlsplit(origin)
    return headers.get("host", "").lower() not in (asking.netloc.lower(), asking.hostname)


def is_local(host: str) -> bool:
    """Whether an address or name is local to this machine, so that others cannot reach it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_users(path: Path) -> dict[str, str]:
    """Reads names and passwords from lines `name:password`. Empty lines and lines that begin with # are ignored.

    Raises:
        ValueError: the file is not UTF-8, a line has another form, a name occurs twice, or there is no name. The message names
            file and line.
    """
    users: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        name = name.strip()
        if not (colon and name and password):
            raise ValueError(f"{path}, line {number}: expected name:password")
        if name in users:
            raise ValueError(f"{path}, line {number}: the name {name!r} occurs twice")
        users[name] = password
    if not users:
        raise ValueError(f"{path} names nobody: expected lines such as ada:her-password")
    return users


def sign_in(password: str | None, users: Mapping[str, str]) -> Callable[[str, str], bool] | None:
    """The function with which Gradio checks names and passwords; None if nobody has to sign in.

    With one password for everybody, raters may sign in with any name, under which they then judge.
    """
    if password is None and not users:
        return None

    def check(name: str, given: str) -> bool:
        expected = users.get(name, "") if users else password or ""
        known = bool(expected) and 0 < len(name.strip()) <= LONGEST_NAME and name.isprintable()
        return hmac.compare_digest(given.encode(), expected.encode()) and known

    return check


def _host(header: str) -> str:
    """The host in a Host header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]
