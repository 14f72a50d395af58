"""The page as one HTML document: markup, style, program and, in an export, parameters."""

import base64
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

__all__ = ["document"]


def document(settings: Mapping[str, Any], parameters: Mapping[str, bytes] | None = None, nonce: str = "") -> str:
    """The whole page.

    Args:
        settings: what the page has to know at its start, plain JSON.
        parameters: containers by name, put into the page in base64.
        nonce: for the Content-Security-Policy of a server.
    """
    static = resources.files(__package__) / "static"
    html, css, js = ((static / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    blocks = [f'<script type="application/json" id="settings">{_json(settings)}</script>']
    for name, raw in (parameters or {}).items():
        text = base64.b64encode(raw).decode()
        blocks.append(f'<script type="application/octet-stream" data-parameters="{name}">{text}</script>')
    # The first container stands before the program: its image is shown while the browser reads the others.
    return (
        html.replace("<!-- data -->", "\n".join(blocks[:2]))
        .replace("<!-- more data -->", "\n".join(blocks[2:]))
        .replace("/* style */", css)
        .replace("/* program */", js)
        .replace("{{nonce}}", nonce)
    )


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
