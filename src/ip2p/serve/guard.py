"""What every request passes first: who may come, from where, with how many bytes and in what time.

A form of any web page may post to a server on this machine without asking (a multipart body needs no
preflight), and a name of any web page may be made to point here. So Host and Origin are checked even on
loopback, and other origins may do nothing except those that the operator names (--allow-origin).
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
OPEN_PATHS = ("/healthz", "/readyz")  # for monitors: without a key, and not logged
LONGEST_NAME = 255  # bytes between two slashes
BODY_SECONDS = 60.0  # for a body to arrive
SILENT_SECONDS = 15.0  # between two of its parts
BODIES_AT_ONCE = 8  # of the largest size; more bytes than that are not held at once
# Brackets, braces and commas of a body that may be JSON, besides those in an edit's texts. Each may become an
# object of 60 bytes, and parsing blocks the server. A file's base64 has none, an edit about 50.
STRUCTURE = 20_000

# The page: files of this server alone, no script or style in the HTML, and pictures that it made itself.
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
    """ASGI middleware around the whole app, the page included.

    It puts into `scope["state"]`: client, the caller's name (`caller_name`), and let_go, to call once
    nothing of the body is held any more; without that call it counts until the answer is out.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.hosts = hosts_of(config)
        # A name that points here can be anybody's; an address in the Host cannot be made to.
        self.any_address = not is_loopback(config.host)
        self.origins = frozenset(origin.lower() for origin in config.allow_origin)
        self.keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys()]
        self.most = config.max_mb * 1_000_000
        self.structure = STRUCTURE + 2 * config.max_words  # an instruction and a negative prompt
        self.held = 0
        self.salt = secrets.token_bytes(16)
        # A preflight comes without a key, so it is answered before the key is checked.
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
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, began, status, path = headers_of(scope), time.perf_counter(), 0, scope["path"]
        request = secrets.token_hex(12)
        scope.setdefault("state", {}).update(client="-", request=request)
        policy = API_POLICY if path.startswith(API_PATHS) else PAGE_POLICY
        own = SECURITY_HEADERS | {"content-security-policy": policy, "x-request-id": request}
        if self.origins:
            own["vary"] = "Origin"

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(own)
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
                # No query, no body, no instruction, and of the caller only a hash.
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
        """The app's answer or a refusal, without headers for other origins: those are CORSMiddleware's."""
        path, headers, begun = scope["path"], headers_of(scope), False
        body = _Body(self, receive, headers.get("content-type", ""))
        scope["state"]["let_go"] = body.let_go

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name in [name for name in found if name.startswith("access-control-")]:
                    del found[name]
            if body.refusal is None or begun:  # else the app answers a client that it takes for gone
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
        """Raise Refusal for a Host that is not this server, and for a path that cannot exist."""
        if "\0" in path or any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
            # No file system takes it, so the app would fail at it.
            raise Refusal(
                f"The URL has a part longer than {LONGEST_NAME} bytes, or a zero byte. See /docs.",
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
        """The caller's name. Raises Refusal for an Origin or a key that is not let in."""
        if method not in SAFE_METHODS:
            host, origin = headers.get("host", ""), headers.get("origin")
            if origin is None:  # browsers that hide the Origin still send this
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
        """The hash of the request's key, if it is one of the server's."""
        key = headers.get("x-api-key", "")
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = value.strip()
        elif scheme.lower() == "basic":  # what a browser asks for: any name, the key as password
            try:
                key = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                key = ""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # All are compared, each in constant time.
        matches = [known for known in self.keys if hmac.compare_digest(known, digest)]
        return matches[0] if matches else None


class _Body:
    """The body as it comes in, cut off where it is too long, too slow, or JSON of too many parts.

    The app then sees a client that has gone; `refusal` is the answer.
    """

    def __init__(self, guard: Guard, receive: Receive, kind: str) -> None:
        self.guard, self._receive = guard, receive
        self.seen = self.held = self.parts = 0
        self.whole, self.form = False, kind.strip().lower().startswith("multipart/")
        self.refusal: Refusal | None = None
        self.until = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        if self.refusal is None:
            if self.whole:  # all that can still come is that the client goes
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
        """Stop counting the body: nothing of it is held any more."""
        self.guard.held -= self.held
        self.held = 0


def too_large(most: int) -> Refusal:
    return Refusal(
        f"The body is larger than {most / 1e6:g} MB, this server's limit (--max-mb). Send a smaller picture.",
        status=413,
        field="body",
    )


def hosts_of(config: ServeConfig) -> frozenset[str]:
    """The names by which the server may be called."""
    names = {*LOOPBACK_NAMES, *(host_name(name) for name in config.allow_host)}
    if not is_loopback(config.host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower(), host_name(config.host)}
    return frozenset(names - {"0.0.0.0", "::"})


def host_name(host: str) -> str:
    """The name or address of a Host header, in lower case and without port, brackets and the last dot."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and ":" not in name:
        host = name
    return host.rstrip(".")


def same_place(origin: str, host: str) -> bool:
    """Whether `origin` is a page of this server, called `host`.

    A server behind a TLS proxy does not know its own scheme, so only the port is compared.
    """
    scheme, colon, place = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    if default is None or not colon or not place:
        return False
    return place.removesuffix(default) == host.strip().lower().removesuffix(default)


def caller_name(key: bytes | None, peer: Sequence[object] | None, salt: bytes) -> str:
    """A hash of the caller's key, else of its address."""
    if key is None:
        address = str(peer[0]) if peer else ""
        if is_address(address):
            found = ipaddress.ip_address(address)
            if found.version == 6 and found.ipv4_mapped is None:
                # One machine may have all addresses of a /64.
                address = str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
        key = address.encode()
    return hashlib.blake2b(key, key=salt, digest_size=6).hexdigest()


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by lower-case names; all values of one that came twice, so that no check passes it."""
    headers = Headers(scope=scope)
    return {name: ", ".join(headers.getlist(name)) for name in headers.keys()}  # noqa: SIM118


def shown(text: str) -> str:
    """Text from outside for an error or a log: short, on one line, without control characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
