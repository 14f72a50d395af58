"""The server behind `sosvae edit`: decodes, encodes an upload, sends typed arrays, saves. The rest is the page's.

    GET  /?token=…                the page
    GET  api/runs                 the runs, as JSON
    GET  api/heldout?run=&count=  held-out images, as a container of bytes
    POST api/decode               {run, code, precision} → parameters
    POST api/encode?run=          an image file → parameters at its code
    POST api/condition            {run, code, indices, values, …} → an image, where the page cannot work it out
    POST api/save?run=&kind=      a PNG or a session, into the run's folder `edits/`
    GET  api/health

Addresses are relative, so that it works behind a proxy under a path.
"""

import json
import secrets
import socket
import time
from collections.abc import Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..files import write_atomically
from .conditionals import Conditionals
from .document import document
from .guard import App, Guard
from .parameters import container
from .runs import CodeError, Runs
from .uploads import MAX_BYTES, UploadError, read_image

__all__ = ["create_app", "listen"]

MAX_JSON = 32 * 2**20  # pinned values of a large image, as text
MAX_SAVED = 64 * 2**20
KINDS = {"png": b"\x89PNG\r\n\x1a\n", "json": b"{"}  # what may be saved, and how it begins


def create_app(runs: Runs, token: str, host: str = "127.0.0.1", allowed_hosts: Iterable[str] = ()) -> App:
    """The ASGI application, guarded."""
    conditionals = Conditionals(runs)

    async def page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        settings = {"mode": "server", "runs": runs.listing()}
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}' blob:; style-src 'nonce-{nonce}'; img-src blob: data:; "
            "media-src blob:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
        return HTMLResponse(document(settings, nonce=nonce), headers=headers)

    async def listing(_: Request) -> Response:
        return JSONResponse(runs.listing())

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def heldout(request: Request) -> Response:
        count = min(96, max(1, _integer(request, "count", 48)))
        indices, images = await run_in_threadpool(runs.heldout, request.query_params.get("run", ""), count)
        return _binary(container({"images": images}, {"indices": indices}))

    async def decode(request: Request) -> Response:
        asked = await _json(request)
        precision = asked.get("precision", "float32")
        return _binary(await run_in_threadpool(runs.answer, str(asked.get("run")), asked.get("code", {}), precision))

    async def encode(request: Request) -> Response:
        name = request.query_params.get("run", "")
        config = runs.run(name).config.data
        raw = await _body(request, MAX_BYTES)
        image = await run_in_threadpool(read_image, raw, config)
        precision = request.query_params.get("precision", "float32")
        return _binary(await run_in_threadpool(runs.encoded, name, image, precision))

    async def condition(request: Request) -> Response:
        asked = await _json(request)
        return _binary(await run_in_threadpool(conditionals.answer, asked))

    async def save(request: Request) -> Response:
        run = runs.run(request.query_params.get("run", ""))
        kind = request.query_params.get("kind", "")
        if kind not in KINDS:
            raise HTTPException(400, f"expected one of {', '.join(KINDS)}")
        raw = await _body(request, MAX_SAVED)
        if not raw.startswith(KINDS[kind]):
            raise HTTPException(400, f"this is no {kind}")
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.{kind}"
        await run_in_threadpool(write_atomically, run.folder / "edits" / name, raw)
        return JSONResponse({"file": f"edits/{name}"})

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/runs", listing),
            Route("/api/health", health),
            Route("/api/heldout", heldout),
            Route("/api/decode", decode, methods=["POST"]),
            Route("/api/encode", encode, methods=["POST"]),
            Route("/api/condition", condition, methods=["POST"]),
            Route("/api/save", save, methods=["POST"]),
        ],
        exception_handlers={
            CodeError: _told(404),
            UploadError: _told(400),
            ValueError: _told(400),
            HTTPException: _http_error,
        },
    )
    return Guard(_with_headers(app), token, host, allowed_hosts)


def listen(host: str, port: int, tries: int = 20) -> socket.socket:
    """A socket on `port`, or on one of the next `tries` where it is taken.

    Raises:
        OSError: none is free, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port == 0 else range(port, port + tries):
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, candidate))
            sock.listen()  # whoever is quicker than the server waits in line
        except OSError:
            sock.close()
            if candidate == port + tries - 1 or port == 0:
                raise
            continue
        return sock
    raise OSError(f"no port from {port} on is free")


def _with_headers(app: App) -> App:
    """What every answer says: not for sniffing, not for keeping, not for other sites."""
    extra = [
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
    ]

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await app(scope, receive, sending)

    return wrapped


async def _body(request: Request, limit: int) -> bytes:
    """The body, as long as it stays within `limit`: no more is read than that."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise HTTPException(413, f"more than {limit // 2**20} MiB are not taken")
    return bytes(raw)


async def _json(request: Request) -> dict[str, Any]:
    try:
        asked = json.loads(await _body(request, MAX_JSON))
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise HTTPException(400, "expected a JSON object")
    return asked


def _integer(request: Request, name: str, default: int) -> int:
    try:
        return int(request.query_params.get(name, default))
    except ValueError as error:
        raise HTTPException(400, f"{name} is no number") from error


def _binary(raw: bytes) -> Response:
    return Response(raw, media_type="application/octet-stream")


def _told(status: int) -> Any:
    async def tell(_: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), status)

    return tell


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code)
