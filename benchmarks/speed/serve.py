"""Put load on `ip2p serve` from another process, and check it against its limits.

    python -m benchmarks.speed serve                      # a model that takes 20 ms a call
    python -m benchmarks.speed serve --model storybook    # the bundled model
    python -m benchmarks.speed serve --checks memory --requests 10000

The fixed-time model is the tests' tiny random one (tests/serve/fakes.py); its network sleeps. Each caller has
its own API key. Every check prints its figure and its limit; the exit code is 1 if one is missed.

goodput     edits answered a second when load is offered at the capacity and at 4 times the capacity, which is
            measured first; how long refusals take and whether they have Retry-After; how long /healthz takes
disconnect  from a caller's disconnection to the free place, against the time of a step
drain       SIGTERM while edits run: they are answered, and the server exits 0
memory      resident memory after many requests against that after a tenth of them
joined      edits a second of 8 callers, against a server with --join 1; in turns
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks.common import ROOT, Failed, free_port, serving

CALLERS = 32
CHILD = """
import sys
sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1] + "/tests/serve"]
import ip2p.diffusion.denoiser  # before the tests' check of every shape, which takes time
from ip2p.cli import main as cli
from ip2p.editing import editor
seconds = float(sys.argv[2])
if seconds >= 0:
    from fakes import fake_editor
    fake = fake_editor(seconds, asleep=True)
    editor.Editor.load = classmethod(lambda cls, *args, **how: fake)
sys.argv[1:] = sys.argv[3:]
cli.entry()
"""


@dataclass
class Server:
    process: Any
    address: str
    keys: list[str]

    def resident(self) -> float:
        """Megabytes of memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@contextlib.contextmanager
def start_server(args: argparse.Namespace, *more: str) -> Iterator[Server]:
    """`ip2p serve` at a free port, with a key for each caller."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        port, keys = free_port(), [secrets.token_hex(24) for _ in range(CALLERS)]
        (Path(folder) / "keys").write_text("\n".join(keys))
        seconds = -1.0 if args.model else args.seconds_a_call
        words = [sys.executable, "-c", CHILD, str(ROOT), str(seconds), "serve", "--port", str(port)]
        words += ["--api-key-file", f"{folder}/keys", "--device", args.device, "--queue", str(args.queue)]
        words += ["--model", args.model or "storybook", *more]
        address = f"http://127.0.0.1:{port}"
        with serving(words, f"{address}/readyz", args.log, cwd=folder) as process:
            yield Server(process, address, keys)


@dataclass(frozen=True)
class Answer:
    """When a request ended, after how many seconds, its status (0: none), and whether it had Retry-After."""

    at: float
    seconds: float
    status: int
    named: bool


@dataclass
class Caller:
    """Sends edits of one small picture, with the keys in turn."""

    client: httpx.AsyncClient
    server: Server
    steps: int
    side: int
    answers: list[Answer] = field(default_factory=list)

    async def edit(self, number: int, **more: str) -> int:
        """Send an edit; returns the status, 0 without a connection."""
        fields = {"instruction": "make it night", "seed": str(number), "steps": str(self.steps)}
        fields |= {"size": str(self.side), **more}
        began = time.monotonic()
        status, named = 0, False
        with contextlib.suppress(httpx.HTTPError):
            reply = await self.client.post(
                f"{self.server.address}/v1/edits",
                data=fields,
                files={"image": ("page.png", small_picture(self.side), "image/png")},
                headers={"Authorization": f"Bearer {self.server.keys[number % CALLERS]}"},
            )
            status, named = reply.status_code, "retry-after" in reply.headers
        self.answers.append(Answer(time.monotonic(), time.monotonic() - began, status, named))
        return status

    async def running(self) -> float:
        """How many requests run on the server."""
        headers = {"Authorization": f"Bearer {self.server.keys[0]}"}
        reply = await self.client.get(f"{self.server.address}/metrics", headers=headers)
        [line] = [line for line in reply.text.splitlines() if line.startswith("ip2p_requests_running ")]
        return float(line.split()[1])

    async def wait_running(self, count: int) -> None:
        while await self.running() < count:
            await asyncio.sleep(0.01)

    def rate(self, begin: float, end: float) -> float:
        """Edits answered a second between two moments."""
        return sum(each.status == 200 and begin <= each.at < end for each in self.answers) / (end - begin)

    async def saturate(self, callers: int, seconds: float) -> float:
        """Edits a second of so many callers, each of which waits for its answer before the next request."""
        begin, numbers = time.monotonic(), iter(range(10**9))

        async def call() -> None:
            while time.monotonic() - begin < seconds:
                await self.edit(next(numbers))

        await asyncio.gather(*(call() for _ in range(callers)))
        good = [each.at for each in self.answers if each.status == 200 and each.at >= begin]
        return len(good) / (max(good) - begin) if good else 0.0

    async def offer(self, rate: float, seconds: float) -> tuple[float, float]:
        """Send `rate` a second at random times, whatever the answers; returns the first and last time."""
        chance = random.Random(0)
        begin = at = time.monotonic()
        sent = []
        while at < begin + seconds:
            at += chance.expovariate(rate)
            await asyncio.sleep(max(0, at - time.monotonic()))
            sent.append(asyncio.ensure_future(self.edit(len(sent))))
        end = time.monotonic()
        await asyncio.gather(*sent)
        return begin, end


@contextlib.asynccontextmanager
async def open_caller(server: Server, args: argparse.Namespace) -> AsyncIterator[Caller]:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=args.patience, limits=limits) as client:
        yield Caller(client, server, args.steps, 64 if args.model else 32)


@functools.cache
def small_picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    return file.getvalue()


async def watch_health(address: str, seconds: list[float], late: list[float]) -> None:
    """Note how long /healthz takes, and how late this process itself wakes up, until cancelled."""
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            began = time.monotonic()
            assert (await client.get(f"{address}/healthz")).status_code == 200
            seconds.append(time.monotonic() - began)
            began = time.monotonic()
            await asyncio.sleep(0.02)
            late.append(time.monotonic() - began - 0.02)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def milliseconds(seconds: Sequence[float]) -> str:
    half, most = (1000 * percentile(seconds, share) for share in (0.5, 0.99))
    return f"{half:.1f} ms (median), {most:.1f} (p99)"


# --- the checks: whether each limit is met, and the figures ----------------------------------------

Verdict = tuple[str, bool, str]


async def goodput(args: argparse.Namespace) -> list[Verdict]:
    seconds: list[float] = []
    late: list[float] = []
    with start_server(args) as server:
        async with open_caller(server, args) as caller:
            await caller.saturate(8, args.seconds / 4)  # the first calls are slow
            watch = asyncio.ensure_future(watch_health(server.address, seconds, late))
            capacity = await caller.saturate(16, args.seconds)
            once = caller.rate(*await caller.offer(capacity, args.seconds))
            caller.answers = []
            begin, end = await caller.offer(4 * capacity, args.seconds)
            watch.cancel()
            # Until the queue is full, answers belong to earlier requests.
            four = caller.rate(begin + (end - begin) / 4, end)
    refused = [each for each in caller.answers if each.status in (429, 503)]
    odd = sorted({each.status for each in caller.answers} - {200, 429, 503})
    named = sum(each.named for each in refused)
    times = [each.seconds for each in refused] or [float("inf")]
    return [
        (
            "goodput",
            four >= 0.9 * capacity,
            f"capacity {capacity:.2f} edits/s; {once:.2f} at 1x, {four:.2f} at 4x: {four / capacity:.2f} of "
            "the capacity (limit 0.90)",
        ),
        (
            "rejects",
            bool(refused) and percentile(times, 0.99) <= 0.05 and named == len(refused) and not odd,
            f"{len(refused)} of {len(caller.answers)} refused (none: raise --seconds), {milliseconds(times)} "
            f"(limit 50); {named} with Retry-After; other answers: {odd or 'none'}",
        ),
        (
            "health",
            percentile(seconds, 0.99) < 0.05,
            f"{len(seconds)} answers, {milliseconds(seconds)} (limit 50); this process woke up late by "
            f"{milliseconds(late)}",
        ),
    ]


async def disconnect(args: argparse.Namespace) -> list[Verdict]:
    with start_server(args) as server:
        async with open_caller(server, args) as caller:
            began = time.monotonic()
            await caller.edit(0)
            step = (time.monotonic() - began) / args.steps
            freed = []
            for number in range(args.rounds):
                leaving = asyncio.ensure_future(caller.edit(number, steps="150"))
                await caller.wait_running(1)
                await asyncio.sleep(3 * step)
                began = time.monotonic()
                leaving.cancel()  # closes the connection
                while await caller.running():
                    assert time.monotonic() - began < args.patience, "the place was never freed"
                freed.append(time.monotonic() - began)
    median = statistics.median(freed)
    figures = f"free after {1000 * median:.0f} ms (median), {1000 * max(freed):.0f} (most); "
    # Reading the metrics takes a little time too.
    return [("disconnect", median <= step + 0.05, f"{figures}a step takes {1000 * step:.0f} ms")]


async def drain(args: argparse.Namespace) -> list[Verdict]:
    with start_server(args, "--drain-seconds", str(args.patience)) as server:
        async with open_caller(server, args) as caller:
            await caller.edit(0)
            running = [asyncio.ensure_future(caller.edit(number, steps="60")) for number in range(3)]
            await caller.wait_running(3)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            late = await caller.edit(4)
            status = await asyncio.gather(*running)
            code = await asyncio.to_thread(server.process.wait, args.patience)
    seconds = time.monotonic() - began
    figures = f"running edits were answered {status}, a new one {late or 'no connection'}; exit {code} after "
    good = status == [200] * 3 and code == 0 and late in (0, 503)
    return [("drain", good, f"{figures}{seconds:.1f} s")]


async def memory(args: argparse.Namespace) -> list[Verdict]:
    with start_server(args, "--keep-seconds", "10") as server:
        async with open_caller(server, args) as caller:
            caller.steps = 1
            numbers = iter(range(args.requests))
            marks: dict[int, float] = {}

            async def call() -> None:
                for number in numbers:
                    # Every kind of end: most are answered, some refused, some left.
                    if number % 50 == 0:
                        leaving = asyncio.ensure_future(caller.edit(number, steps="150"))
                        await asyncio.sleep(0.05)
                        leaving.cancel()
                    elif number % 20 == 0:
                        await caller.edit(number, steps="1000000000")
                    else:
                        await caller.edit(number)
                    if number % max(1, args.requests // 10) == 0:
                        marks[number] = server.resident()

            await asyncio.gather(*(call() for _ in range(8)))
            marks[args.requests] = last = server.resident()
    first = marks[min(number for number in marks if number >= args.requests // 10)]
    return [
        (
            "memory",
            last <= 1.05 * first,
            f"{last:.0f} MB after {args.requests} requests, {first:.0f} after a tenth: "
            f"{100 * (last / first - 1):+.1f}% (limit +5%); MB by request: "
            + " ".join(f"{number}:{size:.0f}" for number, size in sorted(marks.items())),
        )
    ]


async def joined(args: argparse.Namespace) -> list[Verdict]:
    with start_server(args, "--join", "1") as one, start_server(args, "--join", "8") as eight:
        rates: dict[str, list[float]] = {"1": [], "8": []}
        for number in range(args.rounds + 1):
            for name, server in (("1", one), ("8", eight)):
                async with open_caller(server, args) as caller:
                    rate = await caller.saturate(8, args.seconds / 2 if number else 1)
                if number:  # the first round warms up
                    rates[name].append(rate)
    factors = [b / a for a, b in zip(rates["1"], rates["8"], strict=True)]
    return [
        (
            "joined",
            statistics.median(factors) > 1,
            f"{statistics.median(rates['8']):.2f} edits/s of 8 callers, "
            f"{statistics.median(rates['1']):.2f} one at a time: {statistics.median(factors):.2f} times as "
            f"many ({min(factors):.2f} to {max(factors):.2f} in {args.rounds} turns; limit above 1)",
        )
    ]


CHECKS: dict[str, Callable[[argparse.Namespace], Awaitable[list[Verdict]]]] = {
    each.__name__: each for each in (goodput, disconnect, drain, memory, joined)
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model to serve; default: the fixed-time one")
    parser.add_argument("--seconds-a-call", type=float, default=0.02, help="of the fixed-time model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queue", type=int, default=32, help="of the server")
    parser.add_argument("--seconds", type=float, default=20, help="length of each load")
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory check")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=300, help="seconds for an answer")
    parser.add_argument("--checks", choices=CHECKS, nargs="+", default=list(CHECKS))
    parser.add_argument("--log", type=Path, help="file for the server's messages")


def run(args: argparse.Namespace) -> int:
    name = args.model or f"a model of {1000 * args.seconds_a_call:g} ms a call"
    print(f"{name}, {args.steps} steps, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    missed = 0
    for check in args.checks:
        try:
            verdicts = asyncio.run(CHECKS[check](args))  # type: ignore[arg-type]
        except Failed as error:
            raise SystemExit(f"{error} (see --log FILE)") from None
        for title, good, figures in verdicts:
            missed += not good
            print(f"{'pass' if good else 'MISS'}  {title:<11} {figures}", flush=True)
    return int(missed > 0)
