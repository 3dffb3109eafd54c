"""`ip2p serve` and `ip2p ui`: the HTTP server, and the local web page."""

from __future__ import annotations

from ip2p.serve.options import ServeConfig, UiConfig


def run_serve(config: ServeConfig) -> None:
    """Serve until a signal is received."""
    from ip2p.serve import app

    app.serve(config)


def run_ui(config: UiConfig) -> None:
    """Open the page in the browser, and serve it locally until a signal is received."""
    from ip2p.serve import app

    app.ui(config)
