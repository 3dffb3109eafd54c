"""Prometheus metrics of the service."""

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
    """The metrics in Prometheus' text format, version 0.0.4."""
    return generate_latest(SimpleNamespace(collect=lambda: _families(stats)))  # type: ignore[arg-type]


def _families(stats: Stats) -> Iterator[Metric]:
    for name, text, value in (
        ("requests_waiting", "Requests in the queue.", stats.waiting),
        ("requests_running", "Running requests.", stats.running),
        ("clients", "Clients with waiting or running requests.", stats.clients),
        ("draining", "1 while the server is shutting down and rejects requests.", int(stats.draining)),
    ):
        yield GaugeMetricFamily(f"ip2p_{name}", text, value=value)
    outcomes = {name: getattr(stats, name) for name in ("done", "failed", "cancelled")}
    refused = {scope: stats.rejected.get(scope, 0) for scope in ("queue", "client", "draining")}
    for name, text, label, counts in (
        ("requests", "Finished requests, by outcome.", "outcome", outcomes),
        ("rejected", "Rejected requests, by reason.", "scope", refused),
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
    for name, text, upto, total in (  # upto: cumulative counts by upper bound
        ("request_seconds", "Seconds from request to result.", stats.seconds, stats.seconds_sum),
        ("joined_requests", "Requests batched in one network call.", joined, rows),
    ):
        bounds = {"+Inf" if math.isinf(bound) else f"{bound:g}": upto[bound] for bound in sorted(upto)}
        yield HistogramMetricFamily(f"ip2p_{name}", text, buckets=list(bounds.items()), sum_value=total)
