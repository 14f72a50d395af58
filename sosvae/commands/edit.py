"""A page in the browser: paint a few pixels, and the rest of the image follows."""

import contextlib
import os
import secrets
import socket
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .base import parse

if TYPE_CHECKING:
    from ..editor.runs import Runs

USAGE = "RUN [RUN ...] [options]"
PORT = 8642


@dataclass(frozen=True)
class Options:
    """Paint a few pixels in a browser and see the rest of the image follow; or write such a page as one file."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Folders of runs, or a folder that holds some (path)."""
    export: Path | None = None
    """Write one page that needs no server, with parameters of some codes in it, and stop (path)."""
    codes: int = 8
    """In an exported page (count)."""
    port: int = PORT
    """To listen on; the next free one where it is taken, 0 for any."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 to be reachable from other machines."""
    allowed_host: tuple[str, ...] = ()
    """Further names that this machine or a proxy before it is reached by."""
    no_browser: bool = False
    """Print the address and open nothing."""


def main(args: list[str]) -> int:
    """Serves the page until Ctrl-C, or writes it."""
    from ..editor.runs import Runs

    o = parse(Options, "edit", args)
    runs = Runs(o.runs)
    if o.export is not None:
        return _export(runs, o.export, o.codes)
    # The first code is decoded while the server and the browser start. No daemon: torch does not survive being left
    # behind at exit.
    threading.Thread(target=_warm_up, args=(runs,)).start()
    return _serve(runs, o)


def _export(runs: "Runs", path: Path, codes: int) -> int:
    from ..editor.export import export

    written = export(runs, path, codes)
    print(
        f"{path}: {written['bytes'] / 1e6:.2f} MB, {written['codes']} codes, {len(runs.names())} runs; "
        f"float16 is off by at most {255 * written['error']:.2f} of 255 grey levels"
    )
    return 0


def _serve(runs: "Runs", o: Options) -> int:
    try:
        import uvicorn

        from ..editor.server import create_app, listen
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'sosvae[app]'") from error

    # A token that is kept lets pages that are open go on after a restart.
    token = os.environ.get("SOSVAE_EDIT_TOKEN") or secrets.token_urlsafe(24)
    sock = listen(o.host, o.port)
    shown = "127.0.0.1" if o.host in ("0.0.0.0", "") else "[::1]" if o.host == "::" else o.host
    address = f"http://{shown}:{sock.getsockname()[1]}/?token={token}"
    app = create_app(runs, token, o.host, o.allowed_host)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # From here on Ctrl-C is the server's: before, it could fall into a place that swallows it.
            print(f"{address}\nCtrl-C stops.", flush=True)
            if not o.no_browser:
                threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has stopped by then, and raises it once more
        Server(config).run([sock])
    return 0


def _warm_up(runs: "Runs") -> None:
    from ..editor.runs import CodeError

    with contextlib.suppress(CodeError):  # the page will say it
        runs.answer(runs.names()[0], {"kind": "seed", "seed": 0})
