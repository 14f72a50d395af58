"""What the tests of the editor share: a browser, a run nobody had to train, and the page's way with bytes."""

import asyncio
import base64
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sosvae
from sosvae.editor.document import document
from sosvae.training.state import State

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]
TOKEN = "a-token"
HOST = "127.0.0.1:8642"
ADVICE = (
    "browser tests need Chromium and Playwright for Python: apt-get install chromium (or SOSVAE_BROWSER=path of one), "
    "and the extra sosvae[test]"
)


def browser_path():
    """Of a Chromium; without one the test is skipped, or fails where it has to run."""
    found = os.environ.get("SOSVAE_BROWSER") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        found = None
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(ADVICE)
    return found


@pytest.fixture(scope="module")
def chromium():
    """For one file of tests: as long as it is open, Playwright's event loop runs, and nobody else can run one."""
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Playwright itself imports
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
            yield browser
            browser.close()


@pytest.fixture
def tab(chromium):
    """A fresh window in which an error of the page is an error of the test."""
    context = chromium.new_context(viewport={"width": 1100, "height": 800}, accept_downloads=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert not errors


def write_page(folder, parameters, shape, rank, name="page.html"):
    """A page of one code, as `sosvae edit --export` writes it; returns its address."""
    run = {
        "name": "model",
        "head": "structured",
        "shape": shape,
        "latents": 2,
        "source": "test",
        "step": 1,
    }
    settings = {"mode": "file", "runs": [run], "codes": [{"kind": "seed", "seed": 0}]}
    path = folder / name
    path.write_text(document(settings, {"0-0": parameters}), encoding="utf-8")
    return path.as_uri()


def until(page, condition, timeout=20):
    """Waits until an expression is true. (Playwright's own way to wait evaluates strings in the page, which its policy
    forbids.)"""
    end = time.monotonic() + timeout
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {timeout} s: {condition}"
        page.wait_for_timeout(20)


def ready(page):
    """Waits for the first picture, or the next where a code is on its way."""
    until(page, "!!globalThis.sosvae && sosvae.app.frame !== null && !sosvae.app.busy")


def settled(page):
    """Waits until the picture is that of the state."""
    page.evaluate("sosvae.app.engine.ask({type: 'stats', view: sosvae.app.doc.view})")


def shown(page):
    """What the canvas shows, bytes [H, W] of the red channel."""
    settled(page)
    text = page.evaluate(
        "(() => { const {rgba} = sosvae.app.frame.main; let s = '';"
        " for (let i = 0; i < rgba.length; i += 4) s += String.fromCharCode(rgba[i]); return btoa(s); })()"
    )
    height, width = page.evaluate("[sosvae.app.frame.main.height, sosvae.app.frame.main.width]")
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width).astype(int)


def spot(page, x, y):
    """Where the middle of a pixel of the image is in the window."""
    return page.evaluate(
        "([x, y]) => { const {stage} = sosvae; const box = stage.canvas.getBoundingClientRect();"
        " const ratio = stage.canvas.width / box.width;"
        " return [box.left + (stage.left + (x + 0.5) * stage.zoom) / ratio,"
        " box.top + (stage.top + (y + 0.5) * stage.zoom) / ratio]; }",
        [x, y],
    )


def draw(page, *points):
    """A stroke over pixels of the image."""
    page.mouse.move(*spot(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*spot(page, *point), steps=4)
    page.mouse.up()
    settled(page)


def make_run(folder, images, head="structured", channels=1, size=(24, 20), **model):
    """A run with weights drawn at random, large enough to show, over a folder of images."""
    config = sosvae.Config(
        data=sosvae.DataConfig(
            source=f"folder:{images}",
            height=size[0],
            width=size[1],
            channels=channels,
            cache=str(images.parent / "cache"),
            validation=0.4,
        ),
        model=sosvae.ModelConfig(head=head, width=0.06, depth=1, latents=4, **{"rank": 5, "diagonal": 1e-3, **model}),
    )
    torch.manual_seed(3)
    vae = sosvae.VAE(config)
    with torch.no_grad():
        for name, weight in vae.head.named_parameters():
            if name.endswith("weight") and not name.startswith("variance"):
                weight.normal_(std=0.08)
        for norm in vae.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None  # the mean of all batches
        for _ in range(6):  # batch norm's statistics: without them every code gives the same image
            vae.decode(torch.randn(32, vae.latents))
            vae.encode(torch.rand(32, *config.image_shape))
        vae.posterior.weight.normal_(std=0.5)
    run = sosvae.Run.create(folder, config)
    state = State(config, torch.device("cpu"))
    state.step = 1
    run.save(config, 1, vae, state.state_dict())
    return run


def make_images(folder, channels=1, count=12, size=(24, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (6, 5, 3) if channels == 3 else (6, 5), np.uint8))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@contextmanager
def serving(*folders, port=0, env=None, stderr=None, options=()):
    """`sosvae edit` as a person starts it; yields its address and the process."""
    program = [sys.executable, "-W", "ignore", "-m", "sosvae", "edit", *map(str, folders)]
    command = [*program, "--no-browser", "--port", str(port), *options]
    path = os.pathsep.join(str(ROOT / source) for source in (".", "kernels"))  # what the tests themselves run with
    environment = {**os.environ, "PYTHONPATH": path, **(env or {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+", address), address
        yield address, process
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


class Client:
    """Calls an ASGI application as a browser on this machine would."""

    def __init__(self, app):
        self.app = app

    def __call__(self, method, path, body=b"", headers=None, token=TOKEN):
        target, _, query = path.partition("?")
        given = {"host": HOST, **({"x-token": token} if token else {}), **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": target,
            "raw_path": target.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in given.items() if v is not None],
            "server": ("127.0.0.1", 8642),
            "client": ("127.0.0.1", 5),
        }
        sent = []
        chunks = [body[i : i + 2**20] for i in range(0, len(body), 2**20)] or [b""]

        async def receive():
            chunk = chunks.pop(0) if chunks else b""
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

        async def send(message):
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        raw = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], raw, {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def make_runs(root):
    """Runs of both heads that the paper compares."""
    images = make_images(root / "images")
    make_run(root / "runs" / "sos", images)
    make_run(root / "runs" / "beta", images, head="pixelwise")
    return root


@pytest.fixture
def folder(chromium, editor_folder):
    """Of the runs. (Where there is no browser nothing is made.)"""
    return editor_folder


@pytest.fixture
def server(chromium, editor_server):
    """The address of the page."""
    return editor_server


@pytest.fixture
def page(tab, server):
    """The page on its server, with its first picture."""
    tab.goto(server)
    ready(tab)
    return tab


def panel(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def press(page, key):
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(key)
    settled(page)
