"""Who may ask: a token, the Host and the Origin of a request, and what a page may do."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyengine.errors import ConfigError
from pyengine.serve.ids import fingerprint

__all__ = ["Gate", "Safety", "failure"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAFE = ("GET", "HEAD")
# What anybody may ask: the page itself, which holds no secret, and whether the server is well.
OPEN = ("/", "/health", "/ready")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def failure(status: int, message: str, code: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers)


class Gate:
    """`token` is what every client must show; without one the server may listen on loopback alone, unless `insecure`.

    hosts    names by which the server may be asked, beside those of loopback and `host`
    origins  origins of other pages that may ask
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        token: str | None = None,
        *,
        hosts: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        insecure: bool = False,
    ) -> None:
        if host not in LOOPBACK and not token and not insecure:
            raise ConfigError(
                f"anybody who reaches {host} could use this server; give a token by --token or PYENGINE_TOKEN, or listen on 127.0.0.1"
            )
        if token is not None and len(token) < 8:
            raise ConfigError("expected a token of at least 8 characters")
        self._token, self._origins = token, {origin.rstrip("/") for origin in origins}
        self._hosts = {*LOOPBACK, host.lower(), *(name.lower() for name in hosts)}
        # On every address a name of the machine cannot be told from another's; there the token protects.
        self._any_host = host in ("0.0.0.0", "::") and not hosts

    def admits(self, token: str | None) -> bool:
        if self._token is None:
            return True
        return token is not None and hmac.compare_digest(token.encode(), self._token.encode())

    def bearer(self, headers: Mapping[str, str]) -> str | None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else None

    def owner(self, token: str | None) -> str:
        """Whose sessions and jobs these are."""
        return fingerprint(token) if self._token is not None and token else ""

    def client(self, token: str | None, address: Any) -> str:
        """By what rates are counted."""
        return self.owner(token) or str(address[0] if address else "")

    def knows_host(self, host: str) -> bool:
        """Against pages that give their own name another address (DNS rebinding)."""
        name = urlsplit(f"//{host}").hostname if host else None
        return self._any_host or (name is not None and name in self._hosts)

    def knows_origin(self, origin: str | None, host: str) -> bool:
        """A page's origin is this server's own, or one that was allowed; programs send none."""
        if origin is None or origin.rstrip("/") in self._origins:
            return True
        return urlsplit(origin).netloc.lower() == host.lower() != ""


class Safety:
    """Checks every request before the app sees it, and adds what browsers are to keep to."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)
        elif scope["type"] == "http":
            await refusal(scope, receive, _with_headers(send))
        else:  # before it is accepted: the client sees 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        try:
            headers, gate = Headers(scope=scope), self._gate
            host, origin = headers.get("host", ""), headers.get("origin")
            if not gate.knows_host(host):
                return failure(400, "the Host of this request is not this server's", "host")
            is_safe = scope["type"] == "http" and scope["method"] in SAFE
            if not is_safe and not gate.knows_origin(origin, host):
                return failure(403, "another page may not ask this server", "origin")
        except ValueError:  # an address that is none
            return failure(400, "the Host or Origin of this request cannot be read", "host")
        is_open = is_safe and (scope["path"] in OPEN or scope["path"].startswith("/static/"))
        if scope["type"] == "websocket" or is_open:  # a socket shows its token in the first message
            return None
        if not gate.admits(gate.bearer(headers)):
            return failure(401, "a valid token is needed", "token", **{"www-authenticate": "Bearer"})
        return None


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sent
