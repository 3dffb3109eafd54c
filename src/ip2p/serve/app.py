"""`ip2p serve` and `ip2p ui`: how the server starts, listens, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import socket
import sys
import tempfile
import threading
import types
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ip2p.base.devices import pick_device
from ip2p.base.errors import InputError
from ip2p.base.terminal import say
from ip2p.serve.options import ServeConfig, UiConfig

try:
    import h11
    import prometheus_client  # noqa: F401 - else missed when the metrics are read
    import python_multipart  # noqa: F401 - else missed when a form comes
    import uvicorn
    from fastapi import FastAPI
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InputError(
        f"the server needs {error.name}, which is missing; install it: pip install 'ip2p[serve]'"
    ) from None

from ip2p.serve.asgi import make_app
from ip2p.serve.maker import LocalMaker, default_join
from ip2p.serve.mark import checker, marker
from ip2p.serve.requests import Limits
from ip2p.serve.service import Service

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor

HEADER_SECONDS = 20.0  # for a request line and its headers to arrive
OVER_BYTES = 16_000_000  # of a body that is let in after its answer
FLUSH_SECONDS = 5  # after the last edit: for its answer to go out


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    run(config)


def ui(config: UiConfig) -> None:
    """Serve the page to this machine and open it in the browser."""
    run(config.serving(), browser=not config.no_browser, any_port=True)


def run(config: ServeConfig, *, browser: bool = False, any_port: bool = False) -> None:
    """Load the first model, listen, and serve until a signal; the address goes to stderr.

    browser: open the page. any_port: if the port is in use, take the next free one. Raises what the model's
    loading raises, and InputError for an address that cannot be listened at.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(config.host, config.port, tries=20 if any_port else 1))
        service = stack.enter_context(make_service(config, stack))
        service.warm()

        def ready() -> None:
            port = listening.getsockname()[1]
            name = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
            place = f"http://{f'[{name}]' if ':' in name else name}:{port}"
            say(f"the page is at {place}/ and the interfaces at {place}/docs; Ctrl-C stops it")
            if browser:
                webbrowser.open(place)

        settings = server_config(make_app(service, config))
        server = _Server(settings, lambda: service.drain(config.drain_seconds), ready)
        with _access_log():
            server.run(sockets=[listening])


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=_Impatient,
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # with them a caller on this machine could claim any address
        server_header=False,
        lifespan="on",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def make_service(config: ServeConfig, stack: contextlib.ExitStack) -> Service:
    """The service that a config asks for; `stack` removes its folder at the end."""
    store = config.store
    if store is None:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ip2p-results-"))) / "results"
    limits = Limits(
        pixels=config.max_pixels,
        steps=config.max_steps,
        count=config.max_count,
        words=config.max_words,
        queue=config.queue,
        per_client=config.per_client,
    )
    options: dict[str, Any] = {"limits": limits, "keep_seconds": config.keep_seconds, "store": store}
    options["store_bytes"] = config.store_mb * 1_000_000
    if config.ray is None:
        return Service(_local_maker(config), **options)
    from ip2p.serve import spread

    # The one queue here bounds what a replica gets.
    unbounded = dataclasses.replace(limits, queue=10**6, per_client=10**6, waiting_pixels=2**62)
    build = functools.partial(_replica_service, spread.portable(config), unbounded)
    each = config.join or default_join(pick_device(config.device))
    return stack.enter_context(spread.spread(config, build, each=each, **options))


def _replica_service(config: ServeConfig, limits: Limits, stack: contextlib.ExitStack) -> Service:
    return Service(_local_maker(config), limits=limits, keep_seconds=1)


def _local_maker(config: ServeConfig) -> LocalMaker:
    def load(model: str) -> Editor:
        from ip2p.editing.editor import Editor

        return Editor.load(
            model,
            device=config.device,
            dtype=config.dtype,
            memory=config.memory,
            compile=config.compile,
        )

    models = config.models()
    return LocalMaker(
        {name: functools.partial(load, model) for name, model in models.items()},
        join=config.join or default_join(pick_device(config.device)),
        loaded=len(models),
        check=checker(config),
        finish=marker(config),
    )


class _Impatient(H11Protocol):
    """uvicorn's HTTP/1.1, which closes a connection that lingers.

    Either the request line and headers do not arrive, or the body goes on after the answer. The rest of such
    a body is let in for a while, since a client that is cut off while it sends does not read the answer.
    """

    _late: asyncio.TimerHandle | None = None
    _over = 0  # bytes since the answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._over = self._over + len(data) if self._answered else 0
        if self._over > OVER_BYTES:
            self.transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    @property
    def _answered(self) -> bool:
        """Whether a body still comes in after its answer."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
        due = self.conn.their_state is h11.IDLE or self._answered
        if due and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not due and self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """uvicorn that lets the service finish at the first signal and ends at once at the second.

    The process then exits with 0: a request to stop is no failure.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Any], ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain, self._ready = drain, ready
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        if self._draining:
            self.force_exit = self.should_exit = True
            return
        self._draining = True
        threading.Thread(target=self._end, name="ip2p-drain", daemon=True).start()

    def _end(self) -> None:
        try:
            self._drain()
        finally:
            self.should_exit = True


@contextlib.contextmanager
def _listening(host: str, port: int, *, tries: int) -> Iterator[socket.socket]:
    """A listening socket at `port` or the first free port of the `tries` from it on. Raises InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for candidate in range(port, min(port + tries, 65536)):
            try:
                sock.bind((host.strip("[]"), candidate))
                break
            except OSError as error:
                reason = error.strerror or str(error)
        else:
            raise InputError(
                f"cannot listen at {host} port {port}: {reason}. Try --port {(port % 65535) + 1}."
            )
        # Requests that come while the model loads wait.
        sock.listen(128)
        yield sock


@contextlib.contextmanager
def _access_log() -> Iterator[None]:
    """A line of JSON for each request on stderr, without a prefix."""
    access = logging.getLogger("ip2p.serve.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.propagate, before = False, access.propagate
    level = access.level
    access.setLevel(logging.INFO)
    try:
        yield
    finally:
        access.removeHandler(handler)
        access.propagate = before
        access.setLevel(level)
