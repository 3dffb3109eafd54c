"""What the service has done, as text for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from types import SimpleNamespace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as MEDIA_TYPE
from prometheus_client.exposition import generate_latest

from ip2p.serve.service import Stats

__all__ = ["MEDIA_TYPE", "prometheus_text"]


def prometheus_text(stats: Stats) -> bytes:
    """The text exposition format, version 0.0.4."""
    return generate_latest(SimpleNamespace(collect=lambda: _families(stats)))  # type: ignore[arg-type]


def _families(stats: Stats) -> Iterator[Metric]:
    for name, text, value in (
        ("requests_waiting", "Requests in the queue.", stats.waiting),
        ("requests_running", "Requests that the network works on.", stats.running),
        ("clients", "Callers with requests that wait or run.", stats.clients),
        ("draining", "1 while the server takes no more requests.", int(stats.draining)),
    ):
        yield GaugeMetricFamily(f"ip2p_{name}", text, value=value)
    outcomes = {name: getattr(stats, name) for name in ("done", "failed", "cancelled")}
    refused = {scope: stats.rejected.get(scope, 0) for scope in ("queue", "client", "draining")}
    for name, text, label, counts in (
        ("requests", "Requests that ended, by how.", "outcome", outcomes),
        ("rejected", "Requests refused for lack of room, by whose.", "scope", refused),
    ):
        family = CounterMetricFamily(f"ip2p_{name}", text, labels=[label])
        for key, count in counts.items():
            family.add_metric([key], count)
        yield family
    sizes = sorted(stats.joined)
    calls = accumulate(stats.joined[size] for size in sizes)
    joined: dict[float, int] = dict(zip(sizes, calls, strict=True))
    joined[math.inf] = sum(stats.joined.values())
    rows = sum(size * count for size, count in stats.joined.items())
    for name, text, upto, total in (  # upto: how many were at most each bound
        ("request_seconds", "From the request to its end.", stats.seconds, stats.seconds_sum),
        ("joined_requests", "Requests joined in one call of the network.", joined, rows),
    ):
        bounds = {"+Inf" if math.isinf(bound) else f"{bound:g}": upto[bound] for bound in sorted(upto)}
        yield HistogramMetricFamily(f"ip2p_{name}", text, buckets=list(bounds.items()), sum_value=total)
