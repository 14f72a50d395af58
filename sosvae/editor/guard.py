"""Who may ask: any web page that a person has open can reach a local port, so the address alone proves nothing.

- The token, in the page's address and in a header of every request that the page makes: no cookie, so nothing is sent
  along by the browser of its own accord.
- Host: has to be a name that this server goes by, or another site's name could be pointed at 127.0.0.1.
- Origin: where the browser says one, it has to be this server's. `null` (a file, a sandbox) is nobody's.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["Guard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "::1")


class Guard:
    """ASGI middleware that refuses strangers.

    Args:
        token: expected as `?token=` of the page, and in the header `x-token` of everything else.
        host: what the server listens on.
        allowed_hosts: further names that it goes by, such as a proxy's.
    """

    def __init__(self, app: App, token: str, host: str, allowed_hosts: Iterable[str] = ()) -> None:
        self.app, self.token = app, token
        self.allowed = {name.lower() for name in allowed_hosts}
        self.names = self.allowed | {*LOCAL, host.lower()}
        # Only a name can be pointed elsewhere. Who listens for the network may be asked for by number.
        self.numbers = host not in LOCAL

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["path"], scope["query_string"].decode("latin-1"), headers)
        if refusal is None:
            await self.app(scope, receive, send)
            return
        body = refusal.encode()
        start = {
            "type": "http.response.start",
            "status": 403,
            "headers": [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", str(len(body)).encode()),
                (b"x-content-type-options", b"nosniff"),
            ],
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def refusal(self, path: str, query: str, headers: dict[str, str]) -> str | None:
        """Why a request is refused, or None."""
        host = headers.get("host", "")
        if not self._known(_hostname(host)):
            return f"This server does not go by the name {host!r}. If it should: --allowed-host NAME"
        origin = headers.get("origin")
        if origin is not None and not self._same(origin, host):
            return f"Requests from {origin!r} are refused."
        given = headers.get("x-token", "")
        if path == "/":
            given = given or parse_qs(query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return "The token is missing or wrong: open the address that `sosvae edit` printed, all of it."
        return None

    def _known(self, name: str) -> bool:
        return name in self.names or (self.numbers and _is_number(name))

    def _same(self, origin: str, host: str) -> bool:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and (
            parts.netloc.lower() == host.lower() or _hostname(parts.netloc) in self.allowed
        )


def _hostname(netloc: str) -> str:
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
