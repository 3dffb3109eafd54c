"""A server on loopback, in a thread of the test process, for real clients."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from fakes import fake_editor

from ip2p.editing.editor import Editor
from ip2p.serve.app import make_app, server_config
from ip2p.serve.maker import LocalMaker
from ip2p.serve.mark import checker, marker
from ip2p.serve.options import ServeConfig
from ip2p.serve.requests import Limits
from ip2p.serve.service import Service


@dataclasses.dataclass
class Running:
    url: str
    port: int
    service: Service
    editor: Editor
    stop: Callable[[], None]


@contextlib.contextmanager
def running(
    config: ServeConfig | None = None,
    *,
    seconds: float = 0.0,
    page: bool = False,
    join: int = 4,
    port: int = 0,
    models: dict | None = None,
    **limits: int,
) -> Iterator[Running]:
    """A server with the fake model, whose calls take `seconds` longer; `limits` are fields of Limits."""
    config = config or ServeConfig(max_steps=50, max_count=4)
    editor = fake_editor(seconds)
    bounds = Limits(
        **{
            "pixels": config.max_pixels,
            "steps": config.max_steps,
            "count": config.max_count,
            "words": config.max_words,
            **limits,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        maker = LocalMaker(
            {"fake": editor, **(models or {})},
            join=join,
            check=checker(config),
            finish=marker(config),
        )
        service = Service(
            maker,
            limits=bounds,
            keep_seconds=config.keep_seconds,
            store=Path(folder) / "results",
        )
        app = make_app(service, config, page=page)
        settings = server_config(app)
        settings.port = port
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()

        def stop() -> None:
            service.close()
            server.should_exit = True
            thread.join(30)

        try:
            deadline = time.monotonic() + 60
            while not server.started:
                assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", port, service, editor, stop)
        finally:
            stop()
            assert not thread.is_alive(), "the server did not stop"


def until(condition, seconds: float = 20.0) -> None:
    """Wait for a condition; fail if it does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
