"""The editor's page in a browser: time to the first image, from a stroke to the redrawn image, and size as one file.

    python -m bench.editor [--browser chromium] [--strokes 100] [--json FILE]

A browser held to one core (with all that it runs: page, worker, compositor), the server on the others, weights drawn at
random: the arithmetic is that of a trained model. The first image is the mean; the factor follows, and the image can be
painted on. A stroke is one pointer event that pins about 200 more pixels
(600 values in colour); the clock starts before the event and stops when the canvas has been redrawn.
"""

import argparse
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sosvae
from sosvae.editor.export import export
from sosvae.editor.runs import Runs
from sosvae.training.state import State

CASES = {  # preset and head
    "48×40, R = 10": ("faces", "structured"),
    "48×40, R = 10, global-local": ("faces", "global-local"),
    "218×178×3, R = 25": ("celeba", "structured"),
}
CODES = 8
STROKE_PIXELS = 200

# Pointer events on the canvas, as a hand would send them: down, one long move, up. Every stroke lies elsewhere.
STROKES = """
async (count) => {
  const {app, stage} = sosvae;
  const {width, height} = stage.size;
  const box = stage.canvas.getBoundingClientRect();
  const ratio = stage.canvas.width / box.width;
  const send = (type, x, y) => stage.canvas.dispatchEvent(new PointerEvent(type, {
    pointerId: 1, pointerType: 'mouse', button: type === 'pointermove' ? -1 : 0, bubbles: true,
    clientX: box.left + (stage.left + x * stage.zoom) / ratio, clientY: box.top + (stage.top + y * stage.zoom) / ratio,
  }));
  stage.canvas.setPointerCapture = () => {};
  const frame = () => new Promise((resolve) => { const old = app.engine.onFrame;
    app.engine.onFrame = (result) => { old(result); app.engine.onFrame = old; resolve(result); }; });
  const diameter = Math.min(8, width / 4), length = Math.min(PIXELS / diameter, width / 2);
  app.setPrefs({diameter, tool: 'paint', panel: 'save'});
  const times = [], work = [], pinned = [];
  for (let i = 0; i < count; i++) {
    const x = diameter + ((i * 37) % Math.max(1, Math.floor(width - length - 2 * diameter)));
    const y = diameter + ((i * 53) % Math.floor(height - 2 * diameter));
    let done = frame();
    send('pointerdown', x, y);
    await done;
    await new Promise((resolve) => setTimeout(resolve, 30));
    const before = app.frame.pinned;
    done = frame();
    const start = performance.now();
    send('pointermove', x + length, y);
    const result = await done;
    times.push(performance.now() - start);
    work.push(result.milliseconds);
    pinned.push(result.pinned - before);
    done = frame();
    send('pointerup', x + length, y);
    await done;
    await new Promise((resolve) => setTimeout(resolve, 250));
    app.undo();
    await frame();
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  return {times, work, pinned};
}
""".replace("PIXELS", str(STROKE_PIXELS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    parser.add_argument("--strokes", type=int, default=100, help="strokes of each size (count)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    o = parser.parse_args()
    if o.browser is None:
        parser.error("no Chromium: apt-get install chromium, or --browser PATH")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        browser = _on_one_core(Path(folder), o.browser)
        for name, (preset, head) in CASES.items():
            results[name] = measure(Path(folder) / f"{preset}-{head}", preset, head, browser, o.strokes)
    print(table(results))
    if o.json:
        o.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def measure(folder: Path, preset: str, head: str, browser: str, strokes: int) -> dict[str, float]:
    """All numbers of one size, times in milliseconds."""
    from playwright.sync_api import sync_playwright

    _make_run(folder / "run", preset, head)
    written = export(Runs([folder / "run"]), folder / "page.html", CODES)
    result: dict[str, float] = {"exported_bytes": written["bytes"], "float16_error": written["error"]}
    with sync_playwright() as playwright, _server(folder / "run") as address:
        running = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-background-networking"]
        )
        for kind, url in (("served", address), ("file", (folder / "page.html").as_uri())):
            opened, ready = [], []
            for _ in range(3):
                page = running.new_page(viewport={"width": 1280, "height": 800})
                page.goto(url, wait_until="commit")
                while not page.evaluate("!!globalThis.sosvae && sosvae.app.ready > 0"):
                    page.wait_for_timeout(5)
                opened.append(page.evaluate("sosvae.app.firstImage"))
                ready.append(page.evaluate("sosvae.app.ready"))
                if len(opened) < 3:
                    page.close()
            result[f"first_image_{kind}"] = opened[0]
            result[f"first_image_{kind}_again"] = min(opened[1:])
            result[f"ready_{kind}"] = ready[0]
            result[f"ready_{kind}_again"] = min(ready[1:])
            if kind == "served":
                page.wait_for_timeout(1000)
                page.evaluate(STROKES, 5)
                measured = page.evaluate(STROKES, strokes)
                times, work = sorted(measured["times"]), sorted(measured["work"])
                result |= {
                    "stroke_median": _quantile(times, 0.5),
                    "stroke_p95": _quantile(times, 0.95),
                    "worker_median": _quantile(work, 0.5),
                    "stroke_pixels": _quantile(sorted(measured["pinned"]), 0.5),
                }
            page.close()
        running.close()
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    columns = {
        "image": lambda name, r: name,
        "first image": lambda _, r: f"{r['first_image_served']:.0f} ms",
        "to paint on": lambda _, r: f"{r['ready_served']:.0f} ms",
        "again": lambda _, r: f"{r['ready_served_again']:.0f} ms",
        "as a file": lambda _, r: f"{r['ready_file']:.0f} ms",
        "a stroke to the redrawn image, median": lambda _, r: f"{r['stroke_median']:.1f} ms",
        "95 %": lambda _, r: f"{r['stroke_p95']:.1f} ms",
        "of it the worker": lambda _, r: f"{r['worker_median']:.1f} ms",
        "values pinned by it": lambda _, r: f"{r['stroke_pixels']:.0f}",
        f"file of {CODES} codes": lambda _, r: f"{r['exported_bytes'] / 1e6:.2f} MB",
    }
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, r in results.items():
        rows.append(f"| {' | '.join(column(name, r) for column in columns.values())} |")
    return "\n".join(rows)


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def _make_run(folder: Path, preset: str, head: str) -> None:
    config = sosvae.PRESETS[preset][1].replace(model={"head": head})
    torch.manual_seed(0)
    vae: Any = sosvae.VAE(config)
    with torch.no_grad():
        for name, weight in vae.head.named_parameters():
            if name.endswith("weight"):
                weight.normal_(std=0.02)
    state = State(config, torch.device("cpu"))
    state.step = 1
    sosvae.Run.create(folder, config).save(config, 1, vae, state.state_dict())


def _on_one_core(folder: Path, browser: str) -> str:
    """A program that starts the browser on the first of our cores."""
    core = min(os.sched_getaffinity(0))
    script = folder / "browser"
    script.write_text(f'#!/bin/sh\nexec taskset -c {core} "{browser}" "$@"\n', encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@contextlib.contextmanager
def _server(run: Path) -> Iterator[str]:
    """`sosvae edit`, on the other cores where there are any."""
    command = [sys.executable, "-m", "sosvae", "edit", str(run), "--no-browser", "--port", "0"]
    cores = os.sched_getaffinity(0)
    others = cores - {min(cores)} or cores
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, sorted(others))), *command], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    main()
