"""Load on `ip2p serve` from a process of its own, against what the server is to hold.

    python tools/bench_serve.py                      # a model that takes 20 ms a call, whatever it is asked
    python tools/bench_serve.py --model storybook    # the packaged model
    python tools/bench_serve.py --only memory --requests 10000

The server is `ip2p serve` itself in a second process; for the fixed time its model is the tests' tiny random
one (tests/serve/fakes.py), whose network sleeps and whose autoencoder works on 32x32 pixels. Callers have
keys of their own, so that they count as many. Every check prints a line with its figure and its bar; the
exit status is 1 if one is missed.

goodput     edits a second that are answered with a picture, offered at the capacity and at 4 times that; the
            capacity is measured first, with as many callers as keep the server busy
rejects     how long a refusal takes while 4 times the capacity is offered, and whether it has Retry-After
health      how long /healthz takes through all of that. Beside it, how late this process itself wakes up:
            where the machine is shared, no answer can be seen sooner
disconnect  from a caller's leaving to the free place, against the time of a step
drain       SIGTERM while edits run: they are answered, and the server exits 0
memory      resident memory after many requests against that after the first tenth of them
joined      edits a second of 8 callers of one picture each, against a server with --join 1; in turns
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("goodput", "disconnect", "drain", "memory", "joined")
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


# --- the server ------------------------------------------------------------------------------------


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    place: str
    keys: list[str]

    def resident(self) -> float:
        """Megabytes of memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise ProcessLookupError(self.process.pid)


@contextlib.contextmanager
def serving(args: argparse.Namespace, *more: str) -> Iterator[Server]:
    """`ip2p serve` at a free port, with a key for each caller; ended at the end."""
    with tempfile.TemporaryDirectory(prefix="ip2p-bench-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        keys = [secrets.token_hex(24) for _ in range(CALLERS)]
        (Path(folder) / "keys").write_text("\n".join(keys))
        words = ["serve", "--port", str(port), "--api-key-file", f"{folder}/keys", "--device", args.device]
        words += ["--queue", str(args.queue), "--model", args.model or "storybook", *more]
        seconds = -1.0 if args.model else args.seconds_a_call
        with open(args.log or os.devnull, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(ROOT), str(seconds), *words],
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        server = Server(process, f"http://127.0.0.1:{port}", keys)
        try:
            end = time.monotonic() + args.patience
            while not _ready(server.place):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the server did not begin; see what it said with --log FILE")
                time.sleep(0.1)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(place: str) -> bool:
    try:
        return httpx.get(f"{place}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# --- callers ---------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Of requests that ended: when, after how long, with which status."""

    ended: list[tuple[float, float, int, bool]] = field(default_factory=list)

    def rate(self, begin: float, end: float) -> float:
        """Edits a second that were answered in this time."""
        good = [each for each in self.ended if each[2] == 200 and begin <= each[0] < end]
        return len(good) / (end - begin)


@dataclass
class Caller:
    """Sends edits of one small picture with the keys of many; side: of the picture."""

    client: httpx.AsyncClient
    server: Server
    steps: int
    side: int
    answers: Answers = field(default_factory=Answers)

    def request(self, number: int, **more: str) -> httpx.Request:
        fields = {"instruction": "make it night", "seed": str(number), "steps": str(self.steps)}
        fields |= {"size": str(self.side), **more}
        return self.client.build_request(
            "POST",
            f"{self.server.place}/v1/edits",
            data=fields,
            files={"image": ("page.png", picture(self.side), "image/png")},
            headers={"Authorization": f"Bearer {self.server.keys[number % CALLERS]}"},
        )

    async def edit(self, number: int, **more: str) -> httpx.Response | None:
        began = time.monotonic()
        try:
            answer = await self.client.send(self.request(number, **more))
        except httpx.HTTPError:
            self.answers.ended.append((time.monotonic(), time.monotonic() - began, 0, False))
            return None
        now = time.monotonic()
        self.answers.ended.append((now, now - began, answer.status_code, "retry-after" in answer.headers))
        return answer

    async def busy(self, callers: int, seconds: float) -> float:
        """Edits a second of so many callers who each send the next when the last is answered."""
        begin = time.monotonic()
        numbers = iter(range(10**9))

        async def one() -> None:
            while time.monotonic() - begin < seconds:
                await self.edit(next(numbers))

        await asyncio.gather(*(one() for _ in range(callers)))
        # Up to the last answer: all that was sent counts, and all the time that it took.
        good = [at for at, _, status, _ in self.answers.ended if status == 200 and at >= begin]
        return len(good) / (max(good) - begin) if good else 0.0

    async def offer(self, rate: float, seconds: float) -> tuple[float, float]:
        """Send `rate` a second at random times, whatever is answered; the time in which they came."""
        chance = random.Random(0)
        begin = at = time.monotonic()
        sent = []
        number = 0
        while at < begin + seconds:
            at += chance.expovariate(rate)
            await asyncio.sleep(max(0, at - time.monotonic()))
            sent.append(asyncio.ensure_future(self.edit(number)))
            number += 1
        end = time.monotonic()
        await asyncio.gather(*sent)
        return begin, end


@contextlib.asynccontextmanager
async def calling(server: Server, args: argparse.Namespace) -> AsyncIterator[Caller]:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=args.patience, limits=limits) as client:
        yield Caller(client, server, args.steps, 64 if args.model else 32)


@functools.cache
def picture(side: int) -> bytes:
    """A smooth page as PNG: small, so that sending it is not what is measured."""
    page = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


@dataclass
class Watch:
    """How long /healthz takes, and how late this process wakes up."""

    place: str
    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                began = time.monotonic()
                answer = await client.get(f"{self.place}/healthz")
                assert answer.status_code == 200
                self.seconds.append(time.monotonic() - began)
                began = time.monotonic()
                await asyncio.sleep(0.02)
                self.late.append(time.monotonic() - began - 0.02)


async def metric(caller: Caller, name: str) -> float:
    headers = {"Authorization": f"Bearer {caller.server.keys[0]}"}
    answer = await caller.client.get(f"{caller.server.place}/metrics", headers=headers)
    [line] = [line for line in answer.text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[1])


def told(seconds: Sequence[float]) -> str:
    half, most = (1000 * percentile(seconds, share) for share in (0.5, 0.99))
    return f"{half:.1f} ms (median), {most:.1f} (p99)"


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# --- the checks ------------------------------------------------------------------------------------


class Report:
    def __init__(self) -> None:
        self.missed = 0

    def say(self, name: str, good: bool, words: str) -> None:
        self.missed += not good
        print(f"{'pass' if good else 'MISS'}  {name:<11} {words}", flush=True)


async def goodput(args: argparse.Namespace, report: Report) -> None:
    with serving(args) as server:
        watch = Watch(server.place)
        async with calling(server, args) as caller:
            await caller.busy(8, args.seconds / 4)  # the first calls are slow
            async with watch.running():
                capacity = await caller.busy(16, args.seconds)
                print(f"      capacity    {capacity:.2f} edits/s, 16 callers one after the other", flush=True)
                begin, end = await caller.offer(capacity, args.seconds)
                once = caller.answers.rate(begin, end)
                caller.answers = Answers()
                begin, end = await caller.offer(4 * capacity, args.seconds)
                # Until the queue has filled, what is answered was begun before.
                four = caller.answers.rate(begin + (end - begin) / 4, end)
        good = four >= 0.9 * capacity
        report.say(
            "goodput",
            good,
            f"{once:.2f} edits/s at 1x, {four:.2f} at 4x: {four / capacity:.2f} of the capacity (bar 0.90)",
        )
        refused = [each for each in caller.answers.ended if each[2] in (429, 503)]
        odd = [each[2] for each in caller.answers.ended if each[2] not in (200, 429, 503)]
        if refused:
            times = [each[1] for each in refused]
            named = sum(each[3] for each in refused)
            report.say(
                "rejects",
                percentile(times, 0.99) <= 0.05 and named == len(refused) and not odd,
                f"{len(refused)} of {len(caller.answers.ended)} refused, {told(times)} (bar 50); "
                f"{named} with Retry-After; {len(odd)} other answers {sorted(set(odd))}",
            )
        else:
            report.say(
                "rejects", False, f"nothing was refused of {len(caller.answers.ended)}; raise --seconds"
            )
        report.say(
            "health",
            percentile(watch.seconds, 0.99) < 0.05,
            f"{len(watch.seconds)} answers, {told(watch.seconds)} (bar 50); this process woke up late by "
            f"{told(watch.late)}",
        )


async def disconnect(args: argparse.Namespace, report: Report) -> None:
    with serving(args) as server:
        async with calling(server, args) as caller:
            began = time.monotonic()
            await caller.edit(0)
            step = (time.monotonic() - began) / args.steps
            freed = []
            for number in range(args.rounds):
                leaving = asyncio.ensure_future(caller.edit(number, steps="150"))
                while not await metric(caller, "ip2p_requests_running"):
                    await asyncio.sleep(0.01)
                await asyncio.sleep(3 * step)
                began = time.monotonic()
                leaving.cancel()  # closes the connection
                while await metric(caller, "ip2p_requests_running"):
                    assert time.monotonic() - began < args.patience, "the place was never freed"
                freed.append(time.monotonic() - began)
        # What it takes to ask for the numbers is not the server's fault, and little.
        report.say(
            "disconnect",
            statistics.median(freed) <= step + 0.05,
            f"free after {1000 * statistics.median(freed):.0f} ms (median), {1000 * max(freed):.0f} (most); "
            f"a step takes {1000 * step:.0f} ms",
        )


async def drain(args: argparse.Namespace, report: Report) -> None:
    with serving(args, "--drain-seconds", str(args.patience)) as server:
        async with calling(server, args) as caller:
            await caller.edit(0)
            running = [asyncio.ensure_future(caller.edit(number, steps="60")) for number in range(3)]
            while await metric(caller, "ip2p_requests_running") < 3:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            late = await caller.edit(4)
            done = await asyncio.gather(*running)
            status = [answer.status_code if answer else 0 for answer in done]
            code = await asyncio.to_thread(server.process.wait, args.patience)
            refused = "no connection" if late is None else str(late.status_code)
        report.say(
            "drain",
            status == [200] * 3 and code == 0 and refused in ("503", "no connection"),
            f"SIGTERM: running edits were answered {status}, a new one {refused}; exit {code} after "
            f"{time.monotonic() - began:.1f} s",
        )


async def memory(args: argparse.Namespace, report: Report) -> None:
    with serving(args, "--keep-seconds", "10") as server:
        async with calling(server, args) as caller:
            caller.steps = 1
            numbers = iter(range(args.requests))
            marks: dict[int, float] = {}

            async def one() -> None:
                for number in numbers:
                    # Every kind of end: most are done, some refused, some left.
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

            await asyncio.gather(*(one() for _ in range(8)))
            marks[args.requests] = server.resident()
        first = marks[min(number for number in marks if number >= args.requests // 10)]
        last = marks[args.requests]
        states = [each[2] for each in caller.answers.ended]
        report.say(
            "memory",
            last <= 1.05 * first,
            f"{last:.0f} MB after {args.requests} requests, {first:.0f} after a tenth: "
            f"{100 * (last / first - 1):+.1f}% (bar +5%); {states.count(200)} edits",
        )
        print("      " + " ".join(f"{number}:{size:.0f}" for number, size in sorted(marks.items())))


async def joined(args: argparse.Namespace, report: Report) -> None:
    with serving(args, "--join", "1") as one, serving(args, "--join", "8") as eight:
        rates: dict[str, list[float]] = {"1": [], "8": []}
        for round in range(args.rounds + 1):
            for name, server in (("1", one), ("8", eight)):
                async with calling(server, args) as caller:
                    rate = await caller.busy(8, args.seconds / 2 if round else 1)
                if round:  # the first is to warm up
                    rates[name].append(rate)
        factors = [b / a for a, b in zip(rates["1"], rates["8"], strict=True)]
        report.say(
            "joined",
            statistics.median(factors) > 1,
            f"{statistics.median(rates['8']):.2f} edits/s of 8 callers, {statistics.median(rates['1']):.2f} "
            f"one at a time: {statistics.median(factors):.2f} times as many ({min(factors):.2f} to "
            f"{max(factors):.2f} in {args.rounds} turns; bar above 1)",
        )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model to serve; default: the one of fixed time")
    parser.add_argument("--seconds-a-call", type=float, default=0.02, help="of the model of fixed time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queue", type=int, default=32, help="of the server")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--requests", type=int, default=10_000, help="of the check of memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=300, help="seconds for an answer")
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=CHECKS)
    parser.add_argument("--log", type=Path, help="file for what the server says")
    return parser.parse_args(words)


async def main(args: argparse.Namespace) -> int:
    report = Report()
    name = args.model or f"a model of {1000 * args.seconds_a_call:g} ms a call"
    print(f"{name}, {args.steps} steps, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    for check in args.only:
        await globals()[check](args, report)
    return 1 if report.missed else 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(parse())))
