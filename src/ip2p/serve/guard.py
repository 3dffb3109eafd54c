"""What every request passes first: who may come, from where, with how many bytes and in what time.

A form of any web page may post to a server on this machine without asking (a multipart body needs no
preflight), and a name of any web page may be made to point here: so Host and Origin are checked even on
loopback, and nothing is allowed to other origins but those that the operator names (--allow-origin).
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

from starlette.middleware.cors import CORSMiddleware

from ip2p.serve.errors import Refusal, body_of, refusal_of
from ip2p.serve.options import ServeConfig, is_address, is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ip2p.serve.access")
faults = logging.getLogger("ip2p.serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/healthz", "/readyz")  # for what watches over the server: without a key, and not logged
LONGEST_NAME = 255  # bytes between two slashes
BODY_SECONDS = 60.0  # for a body to come, and so for a worker to be kept by one
SILENT_SECONDS = 15.0  # between two of its parts
BODIES_AT_ONCE = 8  # of the largest size; more bytes than that are not held at once
# Brackets, braces and commas of a body that may be JSON, besides what the words of an edit may hold: each may
# become an object of 60 bytes, and nothing else runs while it does. A file's base64 has none of them, an edit
# about 50.
STRUCTURE = 20_000

# The page: files of this server alone, no script or style in the HTML, and pictures that it made itself.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
API_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
OWN_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
API_PATHS = ("/v1/", "/sdapi/", "/metrics", *OPEN_PATHS)


class Guard:
    """ASGI middleware around the whole app, the page included.

    `scope["state"]` has for what is within: client, the caller's name (`caller_name`), and let_go, to call
    once nothing of the body is held any more: else it counts until the answer is out.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.hosts = hosts_of(config)
        # A name that points here can be anybody's; an address in the Host cannot be made to.
        self.any_address = not is_loopback(config.host)
        self.origins = frozenset(origin.lower() for origin in config.allow_origin)
        self.keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys()]
        self.most = config.max_mb * 1_000_000
        self.structure = STRUCTURE + 2 * config.max_words  # an instruction, and what to stay away from
        self.held = 0
        self.salt = secrets.token_bytes(16)
        # A preflight comes without a key, so that it is answered before one is asked for.
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
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, began = headers_of(scope), time.perf_counter()
        scope.setdefault("state", {})["client"] = "-"
        scope["state"]["request"] = request = secrets.token_hex(12)
        named = {"content-security-policy": policy_of(scope["path"]), "x-request-id": request}
        reply = _Reply(send, OWN_HEADERS | named)
        if self.origins:
            reply.headers["vary"] = "Origin"
        try:
            self.check_host(scope["path"], headers.get("host", ""))
            answer = self.shared if headers.get("origin", "") in self.origins else self._answer
            await answer(scope, receive, reply)
        except Refusal as refusal:
            await _refuse(refusal, scope["path"], reply)
        finally:
            if scope["path"] not in OPEN_PATHS:
                self._note(scope, reply.status, began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer, or a refusal; it says nothing of what pages elsewhere may read."""
        headers, reply = headers_of(scope), _Reply(send, {})
        try:
            client = self.check(scope["method"], scope["path"], headers, scope.get("client"))
            scope["state"]["client"] = client
            await self._let_in(scope, receive, reply, headers)
        except Refusal as refusal:
            await _refuse(refusal, scope["path"], reply)
        except Exception:
            faults.exception("%s %s", scope["method"], shown(scope["path"]))
            fault = Refusal("The server failed at this; its log says how.", status=500)
            await _refuse(fault, scope["path"], reply)

    def check_host(self, path: str, host: str) -> None:
        """Raise Refusal for a Host that is not this server, and an address that cannot be one."""
        if "\0" in path or any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
            # No file system takes it, and what lies within would stumble over that.
            raise Refusal(
                f"The address holds a name longer than {LONGEST_NAME} bytes, or a zero.", status=404
            )
        if not self._knows(host):
            raise Refusal(
                f"Host {shown(host)} is not this server's name. Call it by its address, or start it with "
                "--allow-host NAME.",
                status=421,
                field="Host",
            )

    def check(self, method: str, path: str, headers: Mapping[str, str], peer: Sequence[object] | None) -> str:
        """Who calls. Raises Refusal for an Origin or a key that is not to be let in."""
        if method not in SAFE_METHODS:
            host, origin = headers.get("host", ""), headers.get("origin")
            foreign = origin is not None and origin not in self.origins and not same_place(origin, host)
            # Browsers that leave Origin away still say this.
            if foreign or (
                origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            ):
                raise Refusal(
                    f"Origin {shown(origin or 'of another site')} may not post here. Start the server with "
                    "--allow-origin ORIGIN if that page is meant to.",
                    status=403,
                    field="Origin",
                )
        named = None
        if self.keys and path not in OPEN_PATHS:
            named = self._key(headers)
            if named is None:
                raise Refusal(
                    "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                    status=401,
                    field="Authorization",
                    headers={"WWW-Authenticate": 'Basic realm="ip2p", charset="UTF-8"'},
                )
        return caller_name(named if len(self.keys) > 1 else None, peer, self.salt)

    def _knows(self, host: str) -> bool:
        name = host_name(host)
        return name in self.hosts or (self.any_address and is_address(name))

    def _key(self, headers: Mapping[str, str]) -> bytes | None:
        """The hash of the key that came, if it is one of the server's."""
        given = headers.get("x-api-key")
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = value.strip()
        elif scheme.lower() == "basic":  # what a browser asks for: any name, the key as password
            try:
                given = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = None
        if not given:
            return None
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        # All are compared, each in constant time.
        fits = [key for key in self.keys if hmac.compare_digest(key, digest)]
        return fits[0] if fits else None

    async def _let_in(
        self, scope: Scope, receive: Receive, reply: _Reply, headers: Mapping[str, str]
    ) -> None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.most:
            raise too_large(self.most)
        body = _Body(self, receive, headers.get("content-type", ""))
        scope["state"]["let_go"] = body.let_go
        try:
            await self.app(scope, body.receive, reply.send_unless(body))
        except Exception:
            # It was told that its client had gone, which is not what happened.
            if body.refusal is None:
                raise
        finally:
            body.let_go()
        if body.refusal is not None:
            raise body.refusal

    def _note(self, scope: Scope, status: int, began: float) -> None:
        """A line of JSON; no query, no body, no instruction, and of the caller a hash."""
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": scope["method"],
            "path": shown(scope["path"]).strip("'"),
            "status": status,
            "ms": round((time.perf_counter() - began) * 1000, 1),
            "client": scope["state"]["client"],
            "request": scope["state"]["request"],
        }
        log.info("%s", json.dumps(record, ensure_ascii=True))


async def _refuse(refusal: Refusal, path: str, reply: _Reply) -> None:
    if reply.status:  # too late to say anything: the answer had begun
        return
    refusal = refusal_of(refusal, path)
    body = json.dumps(body_of(path, refusal)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await reply({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await reply({"type": "http.response.body", "body": body})


class _Body:
    """The body as it comes in, cut off where it is too long, too slow, or JSON of too many parts.

    What reads it is told then that the client has gone; `refusal` says what to answer.
    """

    def __init__(self, guard: Guard, receive: Receive, kind: str) -> None:
        self.guard, self._receive = guard, receive
        self.seen, self.held, self.whole = 0, 0, False
        self.parts: int | None = None if kind.strip().lower().startswith("multipart/") else 0
        self.refusal: Refusal | None = None
        self.until = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self.whole:  # all that can still come is that the client goes
            return await self._receive()
        patience = min(SILENT_SECONDS, self.until - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, patience))
        except asyncio.TimeoutError:
            self.refusal = Refusal(
                f"The body did not come within {BODY_SECONDS:g} seconds, or stood still for "
                f"{SILENT_SECONDS:g}. Send it again.",
                status=408,
                field="body",
            )
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            data = message.get("body", b"")
            self.seen += len(data)
            self.held += len(data)
            self.guard.held += len(data)
            if self.parts is not None:
                self.parts += sum(data.count(mark) for mark in (b"[", b"{", b","))
            self.whole = not message.get("more_body", False)
            if self.seen > self.guard.most:
                self.refusal = too_large(self.guard.most)
            elif self.parts is not None and self.parts > self.guard.structure:
                self.refusal = Refusal(
                    f"body holds more than {self.guard.structure:,} brackets, braces and commas, the limit. "
                    "Send the fields of an edit alone.",
                    status=422,
                    field="body",
                )
            elif self.guard.held > BODIES_AT_ONCE * self.guard.most:
                self.refusal = Refusal(
                    "Too much is being uploaded at once. Try again in 5 seconds.",
                    status=503,
                    headers={"Retry-After": "5"},
                )
            if self.refusal is not None:
                return {"type": "http.disconnect"}
        return message

    def let_go(self) -> None:
        """What came of it is held no more."""
        self.guard.held -= self.held
        self.held = 0


class _Reply:
    """What goes out, with the headers that every answer has; status is 0 before it begins."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send, self.headers = send, headers
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name.encode(): value.encode("latin-1") for name, value in self.headers.items()}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in own]
            message = {**message, "headers": [*kept, *own.items()]}
        await self._send(message)

    def send_unless(self, body: _Body) -> Send:
        """`send` for what is within: silent once its body was refused, without headers for other origins."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                kept = [pair for pair in headers if not pair[0].lower().startswith(b"access-control-")]
                message = {**message, "headers": kept}
            if body.refusal is None or self.status:
                await self(message)

        return send


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
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        if config.host not in ("0.0.0.0", "::"):
            names.add(host_name(config.host))
    return frozenset(names)


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
    """Whether a page of `origin` lies on this server, called `host`.

    A server behind one that speaks TLS does not know its own scheme: it is not compared, the port is.
    """
    scheme, colon, place = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    if default is None or not colon or not place:
        return False
    return place.removesuffix(default) == host.strip().lower().removesuffix(default)


def caller_name(key: bytes | None, peer: Sequence[object] | None, salt: bytes) -> str:
    """A short name of the caller, that does not say who it is: by its key, else by its address."""
    if key is None:
        address = str(peer[0]) if peer else ""
        if is_address(address):
            found = ipaddress.ip_address(address)
            if found.version == 6 and found.ipv4_mapped is None:
                # One machine may have all of these.
                address = str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
        key = address.encode()
    return hashlib.blake2b(key, key=salt, digest_size=6).hexdigest()


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by lower-case names; of one that came twice, both values, so that no check passes it."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def policy_of(path: str) -> str:
    """What a browser may do with an answer."""
    return API_POLICY if path.startswith(API_PATHS) else PAGE_POLICY


def shown(text: str) -> str:
    """What came from outside, in an error or a log: short, on a line, and nothing that a terminal obeys."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
