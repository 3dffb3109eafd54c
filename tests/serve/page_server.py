"""The page on a server in a thread of this process, over a service with the fake model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import fastapi
import uvicorn
from fakes import fake_editor

from ip2p.serve.maker import LocalMaker
from ip2p.serve.requests import Limits
from ip2p.serve.service import Service


@dataclass(frozen=True)
class Server:
    address: str
    service: Service


@contextlib.contextmanager
def serve_page(*, seconds_a_call: float = 0.005, **limits: int) -> Iterator[Server]:
    """A server of the page alone, on a free port of this machine."""
    from ip2p.serve import ui

    editor = fake_editor(seconds_a_call)
    maker = LocalMaker({"fake": editor, "other": fake_editor(seconds_a_call)})
    service = Service(maker, limits=Limits(**limits))
    app = fastapi.FastAPI()
    ui.mount(app, ui.build_page(service))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port}", service)
    finally:
        # Browsers keep a connection open to say that they are there.
        server.should_exit = server.force_exit = True
        thread.join(10)
        service.close()
