"""What Gradio lets through that the page does not need is turned away here, before Gradio sees it.

Its server also fetches addresses, forwards to other apps, records runs and edits code; and a mounted app,
unlike one that Gradio launched, does not look where a path that a browser sends lies.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image
from starlette.responses import PlainTextResponse

from ip2p.images import READS
from ip2p.serve.session import cache

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

API = "gradio_api/"
# Routes as Gradio 6 has them, below the page's own path; those that end in a sign go on behind it.
OPEN = ("", "config", "theme.css", "favicon.ico", "manifest.json", "robots.txt")
OPEN_BEGINNINGS = ("assets/", "static/", "svelte/")
OPEN_API = (
    *("info", "app_id", "startup-events", "theme.css", "upload", "upload_progress", "reset", "cancel"),
    *("queue/join", "queue/data", "component_server"),
)
OPEN_API_BEGINNINGS = ("file=", "heartbeat/", "call/", "run/", "api/")
BLOBS = 32  # painted masks on their way in, of all browsers together


class Gate:
    """An ASGI application that passes on to Gradio's only what the page and its clients use."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix.strip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._open(scope["path"]):
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _open(self, path: str) -> bool:
        path = path.lstrip("/")
        if self.prefix:
            path = path.removeprefix(self.prefix).lstrip("/")
        if not path.startswith(API):
            return path in OPEN or path.startswith(OPEN_BEGINNINGS)
        path = path.removeprefix(API)
        if path.startswith("file=") and "://" in path:
            return False
        return path.rstrip("/") in OPEN_API or path.startswith(OPEN_API_BEGINNINGS)


class Page(gr.Blocks):
    """Blocks that look at every file a browser names before Gradio opens it. pixels: of one picture."""

    pixels = 16_000_000

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any) -> Any:
        for field, value in zip(block_fn.inputs, inputs, strict=False):
            check_files(value)
            if isinstance(field, gr.ImageEditor):
                self._check_drawing(field, value)
        return await super().preprocess_data(block_fn, inputs, *more, **options)

    def _check_drawing(self, field: gr.ImageEditor, value: Any) -> None:
        """Of all that comes in, Gradio decodes what was painted: its size is read from the header first."""
        if not isinstance(value, dict):
            return
        parts = [value.get("background"), value.get("composite"), *(value.get("layers") or [])]
        sources: list[Any] = [part["path"] for part in parts if isinstance(part, dict) and part.get("path")]
        if blobs := field.blob_storage.get(value.get("id") or ""):
            sources += [
                io.BytesIO(blob) for blob in (blobs.background, blobs.composite, *blobs.layers) if blob
            ]
        for source in sources:
            try:
                with Image.open(source, formats=READS) as picture:
                    width, height = picture.size
            except Exception:  # decoders raise anything
                raise gr.Error("The painted mask is no picture. Paint it again.") from None
            if width * height > self.pixels:
                raise gr.Error(f"The painted mask is {width}x{height}; the limit is {self.pixels:,} pixels.")


def check_files(value: Any) -> None:
    """Raise gr.Error for a file outside of the page's own cache, an address, or one written into the text."""
    if isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        if isinstance(path, str) and not is_ours(path):
            raise gr.Error("A file must be uploaded first: its path is not the page's own.")
        if isinstance(url, str) and url.startswith("data:"):
            raise gr.Error("A file must be uploaded first; it cannot be written into the request.")
        for inner in value.values():
            check_files(inner)
    elif isinstance(value, list):
        for inner in value:
            check_files(inner)


def is_ours(path: str) -> bool:
    """Whether a path lies in the cache, also after links and dots are followed."""
    try:
        return Path(path).resolve().is_relative_to(cache().resolve())
    except (OSError, ValueError):  # a NUL, or 9,000 letters
        return False


class Blobs(OrderedDict[str, Any]):
    """Gradio's place for paintings on their way in, which it never empties: the oldest goes."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > BLOBS:
            self.popitem(last=False)
