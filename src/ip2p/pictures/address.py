"""Download a picture from an http(s) address. Only the command line and Python do this, never the server."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError, ModelError

SCHEMES = ("http", "https")
MAX_BYTES = 200_000_000
MAX_SECONDS = 60.0
SILENCE = 20.0  # seconds without a byte


def is_url(source: object) -> bool:
    """Whether `source` is an http(s) address rather than a path."""
    return isinstance(source, str) and source.lower().startswith(tuple(f"{name}://" for name in SCHEMES))


def file_name(address: str) -> str:
    """The file name in an address, "picture" if it has none."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name or "picture"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only; urllib's own also follows them to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not is_url(newurl):
            raise InputError(
                f"{req.full_url} redirects to {newurl}, which is not an http(s) address. Check the address."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_picture(
    address: str, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS, silence: float = SILENCE
) -> bytes:
    """Download the bytes at an address. The declared content type is ignored.

    silence: seconds without a byte before the download fails. Raises InputError if the address is malformed
    or refused or the file is too large, and ModelError if it cannot be downloaded in time.
    """
    too_large = InputError(
        f"{address} is larger than {max_bytes / 1e6:g} MB. Download it and make it smaller."
    )
    try:
        if not urllib.parse.urlsplit(address).hostname or urllib.parse.urlsplit(address).port == 0:
            raise ValueError("it has no host")
    except ValueError as error:
        raise InputError(f"{address} is not a valid address ({error}). Check it.") from None
    request = urllib.request.Request(address, headers={"User-Agent": "ip2p", "Accept": "image/*"})
    end = time.monotonic() + max_seconds
    parts = bytearray()
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=silence) as answer:
            if int(answer.headers.get("Content-Length") or 0) > max_bytes:
                raise too_large
            while part := answer.read1(1 << 16):
                parts += part
                if len(parts) > max_bytes:
                    raise too_large
                if time.monotonic() > end:
                    raise TimeoutError(f"it took more than {max_seconds:g} s")
            if answer.length:
                raise http.client.IncompleteRead(bytes(parts), answer.length)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{address}: the server responded with {error.code} {error.reason}. Check the address."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"{address} cannot be downloaded ({reason or type(error).__name__}). Check the connection, or "
            "download the file yourself and give its path."
        ) from None
    return bytes(parts)
