"""The application: three interfaces over one service, the page, and errors in each interface's form."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.staticfiles import StaticFiles

from ip2p import __version__
from ip2p.base.errors import Ip2pError
from ip2p.serve import metrics
from ip2p.serve.errors import Refusal, declared_errors, error_response
from ip2p.serve.faces import a1111, native, openai, start
from ip2p.serve.guard import Guard
from ip2p.serve.options import ServeConfig
from ip2p.serve.service import Service
from ip2p.serve.wire import Desk

PAGE = Path(__file__).parent / "page"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


def make_app(service: Service, config: ServeConfig, *, page: bool = True) -> FastAPI:
    """The application over a service with a store. page: with the page at `/`."""
    desk = Desk(service, config)
    app = FastAPI(
        title="ip2p",
        version=__version__,
        summary="Edit pictures by instruction",
        # FastAPI's own pages fetch their viewer from another server.
        docs_url=None,
        redoc_url=None,
        responses=declared_errors("native"),
    )
    for face in (native, start, openai, a1111):
        app.include_router(face.router(desk))

    @app.get("/healthz", tags=["server"], summary="Whether the server lives")
    async def read_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["server"],
        summary="Whether it takes requests",
        responses={503: {"description": "Not now", "content": {"application/json": {}}}},
    )
    async def read_ready() -> JSONResponse:
        ready = service.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    @app.get(
        "/metrics",
        tags=["server"],
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        return Response(metrics.prometheus_text(service.stats()), media_type=metrics.MEDIA_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> Response:
        return FileResponse(PAGE / "docs.html")

    # Before the page, whose errors look different.
    for path in ("/v1/{rest:path}", "/sdapi/{rest:path}", "/healthz", "/readyz", "/metrics"):
        app.add_api_route(path, _refuse_method, methods=METHODS, include_in_schema=False)
    for kind in (Ip2pError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if page:
        app.mount("/", GZipMiddleware(StaticFiles(directory=PAGE, html=True)), name="page")
    # Last, so it is around everything, the page too.
    app.add_middleware(Guard, config=config)  # type: ignore[arg-type]
    return app


async def _refuse_method(request: Request) -> Response:
    """404, or 405 where the address takes other methods."""
    methods = [
        method.upper()
        for path, operations in request.app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    ]
    if not methods:
        raise Refusal(f"{request.method} does nothing at this address. See /docs.", status=404)
    allowed = ", ".join(methods)
    raise Refusal(
        f"{request.method} does nothing at this address; it takes {allowed}.",
        status=405,
        headers={"Allow": allowed},
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has gone; the log tells it from an answer
