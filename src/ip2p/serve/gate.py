"""What Gradio lets through that the page does not need is turned away here, before Gradio sees it.

Its server also fetches addresses, forwards to other apps, records runs and edits code; and a mounted app,
unlike one that Gradio launched, does not look where a path that a browser sends lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image
from starlette.responses import PlainTextResponse

from ip2p.pictures.images import READS
from ip2p.serve.session import cache

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "gradio_api/"
# Routes as Gradio 6 has them, below the page's own path; those that end in a sign go on behind it.
OPEN = ("", "config", "theme.css", "favicon.ico", "manifest.json", "robots.txt")
OPEN_BEGINNINGS = ("assets/", "static/", "svelte/")
OPEN_API = (
    *("info", "app_id", "startup-events", "theme.css", "upload", "upload_progress", "reset", "cancel"),
    *("queue/join", "queue/data"),
)
OPEN_API_BEGINNINGS = ("file=", "heartbeat/", "call/", "run/", "api/")
# Bodies are read whole as JSON before anybody looks at them: a batch of 200 files has 120 kB.
JSON_BYTES = 1_000_000
PARTS = 10  # of a painting: its layers, the picture below them, and all in one


class Gate:
    """An ASGI application that passes on to Gradio's only what the page and its clients use."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix.strip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = self._within(scope["path"])
            if not self._open(path):
                await PlainTextResponse("Not found", 404)(scope, receive, send)
                return
            if is_json(path, scope):
                body = await whole_body(receive, JSON_BYTES)
                if body is None:  # the client has gone
                    return
                if len(body) > JSON_BYTES:
                    most = f"{JSON_BYTES / 1e6:g} MB, the page's limit"
                    words = f"The body is larger than {most}. Send less at a time."
                    await PlainTextResponse(words, 413)(scope, receive, send)
                    return
                receive = told_again(body, receive)
        await self.app(scope, receive, send)

    def _within(self, path: str) -> str:
        """A path below the page's own."""
        path = path.lstrip("/")
        return path.removeprefix(self.prefix).lstrip("/") if self.prefix else path

    def _open(self, path: str) -> bool:
        if not path.startswith(API):
            return path in OPEN or path.startswith(OPEN_BEGINNINGS)
        path = path.removeprefix(API)
        if path.startswith("file=") and "://" in path:
            return False
        return path.rstrip("/") in OPEN_API or path.startswith(OPEN_API_BEGINNINGS)


def is_json(path: str, scope: Scope) -> bool:
    """Whether a request's body is read as JSON, and not to disk as it comes: so far as Guard lets it."""
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and path.rstrip("/") != f"{API}upload"


async def whole_body(receive: Receive, most: int) -> bytearray | None:
    """A body, read no further than to the part that makes it too long; None for one cut off."""
    body = bytearray()
    while len(body) <= most:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


def told_again(body: bytearray, receive: Receive) -> Receive:
    """`receive` as if the body had not been read."""
    messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


class Page(gr.Blocks):
    """Blocks that look at every file a browser names before Gradio opens it. pixels: of one picture."""

    pixels = 16_000_000

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any) -> Any:
        for field, value in zip(block_fn.inputs, inputs, strict=False):
            check_files(value)
            if isinstance(field, gr.ImageEditor):
                self._check_drawing(value)
        return await super().preprocess_data(block_fn, inputs, *more, **options)

    def _check_drawing(self, value: Any) -> None:
        """Of all that comes in, Gradio decodes what was painted: its size is read from the header first."""
        if not isinstance(value, dict):
            return
        parts = [value.get("background"), value.get("composite"), *(value.get("layers") or [])]
        sources: list[Any] = [part["path"] for part in parts if isinstance(part, dict) and part.get("path")]
        if len(sources) > PARTS:
            raise gr.Error(f"The painting has {len(sources)} parts; the limit is {PARTS}. Paint it again.")
        whole, most = 0, 3 * self.pixels  # the paint, what lies below and both in one, all decoded at once
        for source in sources:
            try:
                with Image.open(source, formats=READS) as picture:
                    width, height = picture.size
            except Exception:  # decoders raise anything
                raise gr.Error("The painted mask is no picture. Paint it again.") from None
            whole += width * height
            if whole > most:
                raise gr.Error(
                    f"The painting's parts have {whole:,} pixels; the limit is {most:,}. Paint it again."
                )


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
