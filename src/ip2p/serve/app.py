"""The HTTP application of `ip2p serve` and `ip2p ui`, and the startup and shutdown of the server."""

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
from ip2p.base.errors import InputError, Ip2pError
from ip2p.base.terminal import say
from ip2p.serve.options import ServeConfig, UiConfig

try:
    import h11
    import prometheus_client  # noqa: F401 - if missing, fail now, not at /metrics
    import python_multipart  # noqa: F401 - if missing, fail now, not at the first form
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import compile_path
    from starlette.staticfiles import StaticFiles
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InputError(
        f"the server needs {error.name}, which is missing; install it: pip install 'ip2p[serve]'"
    ) from None

from ip2p import __version__
from ip2p.serve import metrics
from ip2p.serve.errors import Refusal, declared_errors, error_response
from ip2p.serve.faces.a1111 import a1111_router
from ip2p.serve.faces.native import native_router
from ip2p.serve.faces.openai import openai_router
from ip2p.serve.faces.start import start_router
from ip2p.serve.guard import Guard
from ip2p.serve.maker import LocalMaker, default_join
from ip2p.serve.mark import checker, marker
from ip2p.serve.requests import Limits
from ip2p.serve.service import Service
from ip2p.serve.wire import Desk

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor

PAGE = Path(__file__).parent / "page"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
HEADER_SECONDS = 20.0  # timeout for the headers, and for the rest of a body after its response
OVER_BYTES = 16_000_000  # maximum bytes of a body to receive after its response
FLUSH_SECONDS = 5  # time to send the last responses on shutdown


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the running edits."""
    run_server(config)


def ui(config: UiConfig) -> None:
    """Serve the web UI to this machine and open it in the browser."""
    run_server(config.serving(), browser=not config.no_browser, any_port=True, log_requests=False)


def run_server(
    config: ServeConfig, *, browser: bool = False, any_port: bool = False, log_requests: bool = True
) -> None:
    """Load the first model, listen, and serve until a signal. The URL is printed to stderr.

    browser: open the web UI. any_port: if the port is in use, try the next ones. log_requests: log each
    request to stderr as a line of JSON. Raises InputError if the server cannot listen on the address, and
    the errors of loading a model.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(config.host, config.port, tries=20 if any_port else 1))
        service = stack.enter_context(make_service(config, stack))
        service.warm()

        def ready() -> None:
            port = listening.getsockname()[1]
            name = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
            url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
            say(f"web UI: {url}/   API reference: {url}/docs   (press Ctrl-C to stop)")
            if browser:
                webbrowser.open(url)

        settings = server_config(make_app(service, config))
        server = _Server(settings, lambda: service.drain(config.drain_seconds), ready)
        access = logging.getLogger("ip2p.serve.access")
        access.propagate = False
        if log_requests:
            access.addHandler(logging.StreamHandler(sys.stderr))  # no prefix, only JSON
            access.setLevel(logging.INFO)
        server.run(sockets=[listening])


def server_config(app: FastAPI) -> uvicorn.Config:
    """The uvicorn configuration."""
    return uvicorn.Config(
        app,
        http=_TimedProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # otherwise a local client could claim any address
        server_header=False,
        lifespan="on",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def make_service(config: ServeConfig, stack: contextlib.ExitStack) -> Service:
    """Create the service for a config. `stack` removes its temporary folder and stops its replicas."""
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

    # The queue of this process already limits what a replica gets.
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
            parts_from=config.parts_from,
            vae=config.vae,
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
        tiny_vae=config.tiny_vae,
    )


class _TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which also closes slow connections.

    A connection is closed if the request line and headers do not arrive in time, or if the body continues
    for too long after the response. The rest of such a body is accepted for a while, because a client that
    is cut off while sending does not read the response.
    """

    _late: asyncio.TimerHandle | None = None
    _over = 0  # bytes received since the response

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
        """Whether a body is still arriving after its response was sent."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
        due = self.conn.their_state is h11.IDLE or self._answered
        if due and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not due and self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """A uvicorn server that drains the service on the first signal and stops immediately on the second.

    The process then exits with 0, because a requested stop is not a failure.
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
    """Listen on the first free port of `tries` ports, starting at `port`. Raises InputError if none is."""
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
                f"cannot listen on {host} port {port}: {reason}. Try --port {(port % 65535) + 1}."
            )
        # Requests that arrive while the model loads wait in the backlog.
        sock.listen(128)
        yield sock


# --- the application -----------------------------------------------------------------------------


def make_app(service: Service, config: ServeConfig, *, page: bool = True) -> FastAPI:
    """Create the application for a service that has a store. page: serve the web UI at `/`."""
    desk = Desk(service, config)
    app = FastAPI(
        title="ip2p",
        version=__version__,
        summary="Edit pictures by instruction",
        # FastAPI's own docs pages load their scripts from another server.
        docs_url=None,
        redoc_url=None,
        responses=declared_errors("native"),
    )
    for router in (native_router, start_router, openai_router, a1111_router):
        app.include_router(router(desk))

    @app.get("/healthz", tags=["server"], summary="Liveness check")
    async def read_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["server"],
        summary="Readiness check",
        responses={503: {"description": "Not ready", "content": {"application/json": {}}}},
    )
    async def read_ready() -> JSONResponse:
        ready = service.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    @app.get(
        "/metrics",
        tags=["server"],
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        return Response(metrics.prometheus_text(service.stats()), media_type=metrics.MEDIA_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> Response:
        return FileResponse(PAGE / "docs.html")

    # Registered before the page, whose errors have a different format.
    for path in ("/v1/{rest:path}", "/sdapi/{rest:path}", "/healthz", "/readyz", "/metrics"):
        app.add_api_route(path, _refuse_method, methods=METHODS, include_in_schema=False)
    for kind in (Ip2pError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if page:
        app.mount("/", GZipMiddleware(StaticFiles(directory=PAGE, html=True)), name="page")
    # Added last, so that it wraps everything, including the page.
    app.add_middleware(Guard, config=config)  # type: ignore[arg-type]
    return app


async def _refuse_method(request: Request) -> Response:
    """Raise Refusal: 405 if the URL supports other methods, otherwise 404."""
    methods = [
        method.upper()
        for path, operations in request.app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    ]
    if not methods:
        raise Refusal(f"{request.method} is not supported at this URL. See /docs.", status=404)
    allowed = ", ".join(methods)
    raise Refusal(
        f"{request.method} is not supported at this URL; use {allowed}.",
        status=405,
        headers={"Allow": allowed},
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has disconnected; only the log shows this status
