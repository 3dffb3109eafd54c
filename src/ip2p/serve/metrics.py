"""What the service has done, as text for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ip2p.serve.service import Stats

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def prometheus(stats: Stats) -> str:
    """The text exposition format, version 0.0.4."""
    return "\n".join(_lines(stats)) + "\n"


def _lines(stats: Stats) -> Iterator[str]:
    yield from _head("ip2p_requests_waiting", "gauge", "Requests in the queue.")
    yield f"ip2p_requests_waiting {stats.waiting}"
    yield from _head("ip2p_requests_running", "gauge", "Requests that the network works on.")
    yield f"ip2p_requests_running {stats.running}"
    yield from _head("ip2p_clients", "gauge", "Callers with requests that wait or run.")
    yield f"ip2p_clients {stats.clients}"
    yield from _head("ip2p_draining", "gauge", "1 while the server takes no more requests.")
    yield f"ip2p_draining {int(stats.draining)}"
    yield from _head("ip2p_requests_total", "counter", "Requests that ended, by how.")
    for outcome in ("done", "failed", "cancelled"):
        yield f'ip2p_requests_total{{outcome="{outcome}"}} {getattr(stats, outcome)}'
    yield from _head("ip2p_rejected_total", "counter", "Requests refused for want of room, by whose.")
    for scope in ("queue", "client", "draining"):
        yield f'ip2p_rejected_total{{scope="{scope}"}} {stats.rejected.get(scope, 0)}'
    yield from _head("ip2p_request_seconds", "histogram", "From the request to its end.")
    yield from _histogram("ip2p_request_seconds", dict(stats.seconds), stats.seconds_sum)
    yield from _head("ip2p_joined_requests", "histogram", "Requests joined in one call of the network.")
    counts, total, below = stats.joined, sum(n * calls for n, calls in stats.joined.items()), 0
    buckets: dict[float, int] = {}
    for size in sorted(counts):
        below += counts[size]
        buckets[size] = below
    yield from _histogram("ip2p_joined_requests", {**buckets, math.inf: below}, total)


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"


def _histogram(name: str, upto: dict[float, int], total: float) -> Iterator[str]:
    for bound, count in sorted(upto.items()):
        yield f'{name}_bucket{{le="{"+Inf" if math.isinf(bound) else f"{bound:g}"}"}} {count}'
    yield f"{name}_sum {total:g}"
    yield f"{name}_count {upto[math.inf]}"
