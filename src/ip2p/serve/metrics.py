"""What the service has done, as text for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as MEDIA_TYPE
from prometheus_client.exposition import generate_latest

from ip2p.serve.service import Stats

__all__ = ["MEDIA_TYPE", "prometheus_text"]


class _Numbers:
    """The numbers of a service as Prometheus collects them."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        for name, words, value in (
            ("requests_waiting", "Requests in the queue.", stats.waiting),
            ("requests_running", "Requests that the network works on.", stats.running),
            ("clients", "Callers with requests that wait or run.", stats.clients),
            ("draining", "1 while the server takes no more requests.", int(stats.draining)),
        ):
            yield GaugeMetricFamily(f"ip2p_{name}", words, value=value)
        outcomes = {name: getattr(stats, name) for name in ("done", "failed", "cancelled")}
        yield _counter("ip2p_requests", "Requests that ended, by how.", "outcome", outcomes)
        refused = {scope: stats.rejected.get(scope, 0) for scope in ("queue", "client", "draining")}
        yield _counter("ip2p_rejected", "Requests refused for want of room, by whose.", "scope", refused)
        yield _histogram(
            "ip2p_request_seconds", "From the request to its end.", stats.seconds, stats.seconds_sum
        )
        sizes = sorted(stats.joined)
        counts = accumulate(stats.joined[size] for size in sizes)
        upto: dict[float, int] = dict(zip(sizes, counts, strict=True))
        total = sum(size * calls for size, calls in stats.joined.items())
        words = "Requests joined in one call of the network."
        yield _histogram("ip2p_joined_requests", words, {**upto, math.inf: sum(stats.joined.values())}, total)


def prometheus_text(stats: Stats) -> bytes:
    """The text exposition format, version 0.0.4."""
    return generate_latest(_Numbers(stats))  # type: ignore[arg-type]


def _counter(name: str, words: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, words, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, words: str, upto: Mapping[float, int], total: float) -> Metric:
    """upto: how many were at most each bound, infinity included."""
    bounds: Iterator[tuple[float, int]] = iter(sorted(upto.items()))
    buckets = [("+Inf" if math.isinf(bound) else f"{bound:g}", float(count)) for bound, count in bounds]
    return HistogramMetricFamily(name, words, buckets=buckets, sum_value=total)
