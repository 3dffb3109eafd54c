"""Checks of every request before the app: Host, Origin, API key, and the size and speed of the body.

Any web page can post a form to a server on this machine without permission (a multipart body needs no
preflight), and any domain name can be made to resolve to this machine (DNS rebinding). So Host and Origin
are checked even on loopback, and other origins have no access unless the operator allows it (--allow-origin).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware

from ip2p.serve.errors import Refusal, error_response
from ip2p.serve.options import ServeConfig, is_address, is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ip2p.serve.access")
faults = logging.getLogger("ip2p.serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/healthz", "/readyz")  # for monitoring: no key needed, not logged
LONGEST_NAME = 255  # maximum bytes of a path component
BODY_SECONDS = 60.0  # timeout for a body
SILENT_SECONDS = 15.0  # timeout between two chunks of a body
BODIES_AT_ONCE = 8  # all bodies together may use this many times the maximum size
# Maximum number of brackets, braces and commas in a body that may be JSON, in addition to those in the texts
# of an edit. Each may become an object of 60 bytes, and parsing blocks the server. Base64 contains none, and
# an edit about 50.
STRUCTURE = 20_000

# For the page: only files of this server, no inline scripts or styles, and images that it created itself.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
API_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
API_PATHS = ("/v1/", "/sdapi/", "/metrics", *OPEN_PATHS)
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware around the whole app, including the page.

    It sets in `scope["state"]`: client, the client's pseudonym (`caller_name`), and let_go, a function to
    call once the body is no longer in memory. Without this call, the body counts until the response is sent.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.hosts = hosts_of(config)
        # With DNS rebinding, Host is a domain name, never an IP address.
        self.any_address = not is_loopback(config.host)
        self.origins = frozenset(origin.lower() for origin in config.allow_origin)
        self.keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys()]
        self.most = config.max_mb * 1_000_000
        self.structure = STRUCTURE + 2 * config.max_words  # for the instruction and the negative prompt
        self.held = 0
        self.salt = secrets.token_bytes(16)
        # A preflight request has no key, so it is answered before the key is checked.
        self.shared = CORSMiddleware(
            self._answer,
            allow_origins=config.allow_origin,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "X-API-Key"),
            expose_headers=("Location", "Retry-After", "X-Request-Id"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # WebSockets are not supported
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, began, status, path = headers_of(scope), time.perf_counter(), 0, scope["path"]
        request = secrets.token_hex(12)
        scope.setdefault("state", {}).update(client="-", request=request)
        policy = API_POLICY if path.startswith(API_PATHS) else PAGE_POLICY
        extra_headers = SECURITY_HEADERS | {"content-security-policy": policy, "x-request-id": request}
        if self.origins:
            extra_headers["vary"] = "Origin"

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(extra_headers)
            await send(message)

        try:
            self.check_host(path, headers.get("host", ""))
        except Refusal as refusal:
            await error_response(refusal, path)(scope, receive, reply)
        else:
            answer = self.shared if headers.get("origin", "") in self.origins else self._answer
            await answer(scope, receive, reply)
        finally:
            if path not in OPEN_PATHS:
                # For privacy: no query, no body, no instruction, and only a hash of the client.
                record = {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "method": scope["method"],
                    "path": shown(path).strip("'"),
                    "status": status,
                    "ms": round((time.perf_counter() - began) * 1000, 1),
                    "client": scope["state"]["client"],
                    "request": request,
                }
                log.info("%s", json.dumps(record))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the app's response or a refusal, without CORS headers, which only CORSMiddleware sets."""
        path, headers, begun = scope["path"], headers_of(scope), False
        body = _Body(self, receive, headers.get("content-type", ""))
        scope["state"]["let_go"] = body.let_go

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name in [name for name in found if name.startswith("access-control-")]:
                    del found[name]
            if body.refusal is None or begun:  # otherwise the app saw a disconnect, and the refusal is sent
                begun = True
                await send(message)

        refusal: Refusal | None = None
        try:
            scope["state"]["client"] = self.check(scope["method"], path, headers, scope.get("client"))
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > self.most:
                raise too_large(self.most)
            await self.app(scope, body.receive, reply)
        except Refusal as error:
            refusal = error
        except Exception:
            if body.refusal is None:
                faults.exception("%s %s", scope["method"], shown(path))
                refusal = Refusal("Internal error. See the server's log.", status=500)
        finally:
            body.let_go()
        refusal = body.refusal or refusal
        if refusal is not None and not begun:
            await error_response(refusal, path)(scope, receive, send)

    def check_host(self, path: str, host: str) -> None:
        """Raise Refusal if Host is not a name of this server, or if the path cannot exist."""
        if "\0" in path or any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
            # No file system accepts such a name, so the app would fail.
            raise Refusal(
                f"The URL has a part longer than {LONGEST_NAME} bytes, or a null byte. See /docs.",
                status=404,
            )
        name = host_name(host)
        if name not in self.hosts and not (self.any_address and is_address(name)):
            raise Refusal(
                f"Host {shown(host)} is not a name of this server. Use its IP address, or start it with "
                "--allow-host NAME.",
                status=421,
                field="Host",
            )

    def check(self, method: str, path: str, headers: Mapping[str, str], peer: Sequence[object] | None) -> str:
        """The client's pseudonym. Raises Refusal for a forbidden Origin and for a missing or wrong key."""
        if method not in SAFE_METHODS:
            host, origin = headers.get("host", ""), headers.get("origin")
            if origin is None:  # browsers that omit Origin still send this
                foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            else:
                foreign = origin not in self.origins and not same_place(origin, host)
            if foreign:
                raise Refusal(
                    f"Origin {shown(origin or 'of another site')} is not allowed. To allow it, start "
                    "the server with --allow-origin ORIGIN.",
                    status=403,
                    field="Origin",
                )
        key = None
        if self.keys and path not in OPEN_PATHS:
            key = self._key(headers)
            if key is None:
                raise Refusal(
                    "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                    status=401,
                    field="Authorization",
                    headers={"WWW-Authenticate": 'Basic realm="ip2p", charset="UTF-8"'},
                )
        return caller_name(key if len(self.keys) > 1 else None, peer, self.salt)

    def _key(self, headers: Mapping[str, str]) -> bytes | None:
        """The hash of the request's key, or None if the key is not valid."""
        key = headers.get("x-api-key", "")
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = value.strip()
        elif scheme.lower() == "basic":  # a browser's login dialog: any user name, the key as password
            try:
                key = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                key = ""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Compare all keys, each in constant time.
        matches = [known for known in self.keys if hmac.compare_digest(known, digest)]
        return matches[0] if matches else None


class _Body:
    """Receives a body, and cuts it off if it is too large, too slow, or JSON with too many elements.

    The app then sees a disconnect, and `refusal` is the response.
    """

    def __init__(self, guard: Guard, receive: Receive, kind: str) -> None:
        self.guard, self._receive = guard, receive
        self.seen = self.held = self.parts = 0
        self.whole, self.form = False, kind.strip().lower().startswith("multipart/")
        self.refusal: Refusal | None = None
        self.until = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        if self.refusal is None:
            if self.whole:  # only a disconnect can follow
                return await self._receive()
            patience = min(SILENT_SECONDS, self.until - time.monotonic())
            try:
                message = await asyncio.wait_for(self._receive(), max(0.001, patience))
            except asyncio.TimeoutError:
                self.refusal = Refusal(
                    f"The body did not arrive within {BODY_SECONDS:g} seconds, or paused for "
                    f"{SILENT_SECONDS:g}. Send it again.",
                    status=408,
                    field="body",
                )
            else:
                if message["type"] == "http.request":
                    self._count(message)
                if self.refusal is None:
                    return message
        return {"type": "http.disconnect"}

    def _count(self, message: Message) -> None:
        data, guard = message.get("body", b""), self.guard
        self.whole = not message.get("more_body", False)
        self.seen += len(data)
        self.held += len(data)
        guard.held += len(data)
        if not self.form:
            self.parts += sum(data.count(mark) for mark in (b"[", b"{", b","))
        if self.seen > guard.most:
            self.refusal = too_large(guard.most)
        elif self.parts > guard.structure:
            self.refusal = Refusal(
                f"body has more than {guard.structure:,} brackets, braces and commas. "
                "Send only the fields of an edit.",
                status=422,
                field="body",
            )
        elif guard.held > BODIES_AT_ONCE * guard.most:
            self.refusal = Refusal(
                "Too many uploads at once. Try again in 5 seconds.",
                status=503,
                headers={"Retry-After": "5"},
            )

    def let_go(self) -> None:
        """Stop counting the body, which is no longer in memory."""
        self.guard.held -= self.held
        self.held = 0


def too_large(most: int) -> Refusal:
    return Refusal(
        f"The body is larger than {most / 1e6:g} MB, this server's limit (--max-mb). Send a smaller picture.",
        status=413,
        field="body",
    )


def hosts_of(config: ServeConfig) -> frozenset[str]:
    """The host names that the server accepts."""
    names = {*LOOPBACK_NAMES, *(host_name(name) for name in config.allow_host)}
    if not is_loopback(config.host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower(), host_name(config.host)}
    return frozenset(names - {"0.0.0.0", "::"})


def host_name(host: str) -> str:
    """The name or address in a Host header, in lower case, without port, brackets and trailing dot."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and ":" not in name:
        host = name
    return host.rstrip(".")


def same_place(origin: str, host: str) -> bool:
    """Whether `origin` is this server, whose Host header is `host`.

    The scheme is not compared, because a server behind a TLS proxy does not know its own.
    """
    scheme, colon, authority = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    if default is None or not colon or not authority:
        return False
    return authority.removesuffix(default) == host.strip().lower().removesuffix(default)


def caller_name(key: bytes | None, peer: Sequence[object] | None, salt: bytes) -> str:
    """A hash of the client's key or, without a key, of its address."""
    if key is None:
        address = str(peer[0]) if peer else ""
        if is_address(address):
            found = ipaddress.ip_address(address)
            if found.version == 6 and found.ipv4_mapped is None:
                # One machine may own all addresses of a /64.
                address = str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
        key = address.encode()
    return hashlib.blake2b(key, key=salt, digest_size=6).hexdigest()


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by lower-case name. Repeated headers are joined, so that they fail every check."""
    headers = Headers(scope=scope)
    return {name: ", ".join(headers.getlist(name)) for name in headers.keys()}  # noqa: SIM118


def shown(text: str) -> str:
    """Untrusted text for an error or a log: shortened, on one line, without control characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
