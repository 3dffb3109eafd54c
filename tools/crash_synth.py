"""Kill the commands that make training data, again and again, and compare what comes out.

    python tools/crash_synth.py                                # all: 20 kills of each, some minutes
    python tools/crash_synth.py --only pairs --ways here --kills 5

`ip2p synth instruct`, `pairs` and `filter` run on a small random painter, CLIP and language model, on the CPU
in fp32, with parts of their default size. Each is killed (kill -9) at random times, half of them while it
starts and half while it works, and called again, until it has been killed so often; then it runs to its end.

    here       the command is killed; it works in its own process
    processes  the command is killed; processes beside it work for it
    process    one of those processes is killed; the command goes on
    driver     the command is killed; workers of a Ray cluster work for it
    worker     a worker of the cluster is killed; the command goes on

What is there then must be what an undisturbed run left: the same ids, none lost and none twice, and the same
bytes in every table; and what was made in vain no more than one part a worker and kill. `full-disk` fills a
small disk instead. A line a trial on stdout, a verdict last; the exit code is 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crash_train import PATIENCE, Failed, must

THINGS = (
    *("cat", "dog", "fox", "cow", "pig", "duck", "bird", "tree"),
    *("house", "car", "boat", "kite", "bus", "train", "tent", "robot"),
)
COLOURS = ("red", "blue", "green", "white", "black", "pink")
PLACES = ("a field", "a forest", "a city", "the desert", "the mountains", "a harbour", "a garden", "the snow")
CAPTIONS = [f"a {c} {t} in {p}" for p, t, c in itertools.product(PLACES, THINGS, COLOURS)]
WEATHERS = ("fog", "rain", "sunshine")
WORKERS = 2
HERE = ("--workers", "1")
HALF = ("--image", "-1", "--caption", "-1", "--directional", "0")  # what a random CLIP lets through
# On a busy machine its workers are otherwise the last to run, and what starts slowly is given up.
RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
NOTES = "notes.jsonl"  # beside what a command writes: which process began a part, in which run


@dataclass(frozen=True)
class Verb:
    """A command, and where it leaves what.

    words: its words for an output; output: the name of that; jobs: the folders of its jobs. whole: of a
    command that has one, the file that is written at its end.
    """

    words: Callable[[Path, Path], list[str]]  # (root, output)
    output: str
    jobs: Callable[[Path], list[Path]]
    whole: bool = False


VERBS = {
    "instruct": Verb(
        lambda root, output: [
            *("synth", "instruct", str(root / "captions.txt"), "-o", str(output)),
            *("--model", str(root / "lm"), "--device", "cpu", "--dtype", "fp32"),
        ],
        "triples.parquet",
        lambda output: [output.with_suffix(".parts")],
        whole=True,
    ),
    "pairs": Verb(
        lambda root, output: [
            *("synth", "pairs", str(root / "triples.parquet"), "-o", str(output)),
            *("--model", str(root / "painter"), "--device", "cpu", "--dtype", "fp32"),
            *("--steps", "2", "--most", "2", *HALF),
        ],
        "pairs",
        lambda output: [output],
    ),
    "filter": Verb(
        lambda root, output: [
            *("synth", "filter", str(root / "unfiltered"), "-o", str(output)),
            *("--clip", str(root / "painter" / "clip"), "--device", "cpu", "--top", "0", *HALF),
        ],
        "kept",
        lambda output: [output / "scores", output],
    ),
}


# --- the command, with notes ----------------------------------------------------------------------


class Noting:
    """A stage that notes each part that it begins, and in which process.

    It lies in the program that is called, so that Ray's workers get it by value.
    """

    def __init__(self, stage: Callable[[], Any], notes: str, run: int) -> None:
        self.notes, self.run = notes, run
        self.stage = stage()

    def __call__(self, part: Any) -> Any:
        line = json.dumps({"run": self.run, "pid": os.getpid(), "begun": repr(part[0])[:80]}) + "\n"
        place = os.open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(place, line.encode())
        os.close(place)
        return self.stage(part)


def command(notes: Path, run: int, words: list[str]) -> int:
    """The `ip2p` command with `words`, whose stages note what they begin."""
    from ip2p.base import jobs
    from ip2p.cli import main as cli

    plain = jobs.run

    def noting(stage: Callable[[], Any], *rest: Any, **more: Any) -> Any:
        return plain(partial(Noting, stage, str(notes), run), *rest, **more)

    jobs.run = noting
    return cli.main(words)


STARTED: list[Process] = []  # that may still run when a trial fails


class Process:
    """A process that is forked off, and has what was imported here already: importing takes longer than work.

    What it says on stderr goes to the file `told`.
    """

    def __init__(self, main: Callable[[], int], told: Path) -> None:
        self.told, self.code = told, None
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            code = 70
            try:
                place = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(place, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.pid = pid
        self.code: int | None
        STARTED.append(self)

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def ends(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.poll() is not None

    def kill(self) -> None:
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        must(self.ends(PATIENCE), "a killed process does not end")

    def done(self, code: int = 0) -> str:
        """What it said, at its end. Failed unless it exits with `code`."""
        if not self.ends(PATIENCE):
            self.kill()
        must(self.code == code, f"exit {self.code}, not {code}: {self.said()[-600:]}")
        return self.said()

    def said(self) -> str:
        return self.told.read_text() if self.told.exists() else ""


def cluster() -> int:
    """Ray on this machine, until stdin ends; its address goes to stdout."""
    import ray
    from ray._private import services

    ask, until = services.get_node, time.monotonic() + PATIENCE

    def asking(*given: Any) -> Any:
        """Ray gives itself 30 seconds to start, which a busy machine may not have."""
        while True:
            try:
                return ask(*given)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    services.get_node = asking
    # One of its own, whatever else runs on this machine.
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
    ray.init("local", num_cpus=WORKERS, **quiet)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
    return 0


# --- one output, killed and called again ------------------------------------------------------------


@dataclass
class Runs:
    """The runs of a verb into one output. `folder` holds the notes, and it too unless `disk` does."""

    root: Path
    verb: Verb
    folder: Path
    more: tuple[str, ...] = HERE
    disk: Path | None = None
    count: int = 0

    @property
    def output(self) -> Path:
        return (self.disk or self.folder) / self.verb.output

    def start(self) -> Process:
        self.folder.mkdir(exist_ok=True)
        self.count += 1
        words = [*self.verb.words(self.root, self.output), *self.more]
        main = partial(command, self.folder / NOTES, self.count, words)
        return Process(main, self.folder / "told.txt")

    def begun(self) -> list[dict[str, Any]]:
        """The notes, all runs'."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / NOTES).read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    def committed(self) -> Counter[tuple[str, int]]:
        """How often each part of each job stands in its manifest."""
        found: Counter[tuple[str, int]] = Counter()
        for place in self.verb.jobs(self.output):
            found.update((place.name, row["part"]) for row in lines_of(place) if "part" in row)
        return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    from ip2p.base.jobs import MANIFEST

    with contextlib.suppress(FileNotFoundError):
        text = (folder / MANIFEST).read_bytes()
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    return []


@dataclass(frozen=True)
class Left:
    """What lies there in the end. files: the checksum of every table, by job and name."""

    ids: list[str]
    files: dict[str, str]
    parts: int


def left(runs: Runs) -> Left:
    """What the runs left. Failed when a file is not what its manifest says, or a part is not listed."""
    import hashlib

    import pyarrow.parquet as pq

    from ip2p.base import jobs

    ids: list[str] = []
    files: dict[str, str] = {}
    parts = 0
    for place in runs.verb.jobs(runs.output):
        rows = lines_of(place)
        must(rows and rows[-1] == {"done": True}, f"{place.name} is not done")
        must(jobs.damaged(place) == [], f"damaged: {jobs.damaged(place)}")
        listed = {row["part"]: row for row in rows if "part" in row}
        must(len(listed) == rows[0]["job"]["parts"], f"{len(listed)} parts of {rows[0]['job']['parts']}")
        parts += len(listed)
        for row in listed.values():
            files |= {f"{place.name}/{name}": sha256 for name, (_, sha256) in row["files"].items()}
        inside = {str(path.relative_to(place)) for path in place.rglob("*.parquet")}
        nested = [other for other in runs.verb.jobs(runs.output) if other != place and place in other.parents]
        inside -= {str(path.relative_to(place)) for other in nested for path in other.rglob("*.parquet")}
        written = {name for row in listed.values() for name in row["files"]}
        must(inside == written, f"{place.name} holds files of no part: {sorted(inside - written)[:3]}")
    if runs.verb.whole:
        files[runs.output.name] = hashlib.sha256(runs.output.read_bytes()).hexdigest()
        ids = pq.read_table(runs.output, columns=["id"])["id"].to_pylist()
    else:
        data = sorted((runs.output / "data").glob("train-*.parquet"))
        ids = [id for path in data for id in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    return Left(ids, files, parts)


# --- the trials ---------------------------------------------------------------------------------


class Bench:
    """The small models, the tables, and what undisturbed runs left."""

    def __init__(self, root: Path, kills: int, seed: int) -> None:
        self.root, self.kills, self.random = root, kills, random.Random(seed)
        self.wanted: dict[str, tuple[Left, float, float]] = {}
        self.ray: subprocess.Popen[str] | None = None
        self.address: str | None = None

    def prepare(self) -> None:
        # In a process of its own, so that this one, which the others are forked off, has used no model.
        Process(partial(write_all, self.root), self.root / "told.txt").done()

    def undisturbed(self, name: str) -> tuple[Left, float, float]:
        """What an undisturbed run leaves, and its seconds until it begins with a part, and then."""
        if name not in self.wanted:
            runs = Runs(self.root, VERBS[name], self.root / f"{name}-undisturbed")
            process, started = runs.start(), time.monotonic()
            wait_for(process, runs.begun, "its first part")
            startup = time.monotonic() - started
            process.done()
            work = time.monotonic() - started - startup
            found = left(runs)
            must(found.ids, "an undisturbed run leaves no rows, which would compare with anything")
            must(len(found.ids) == len(set(found.ids)), "an undisturbed run leaves ids that come twice")
            must(found.parts >= 3, f"{found.parts} parts are too few to try anything")
            print(
                f"{name}, undisturbed: {found.parts} parts, {len(found.ids):,} ids, {startup:.1f} s to its "
                f"first part, then {work:.1f} s",
                flush=True,
            )
            self.wanted[name] = found, startup, work
        return self.wanted[name]

    def same(self, name: str, runs: Runs) -> Left:
        """Failed unless the runs left what the undisturbed one did: ids, then bytes; and no part twice."""
        wanted, found = self.undisturbed(name)[0], left(runs)
        lost, more = Counter(wanted.ids) - Counter(found.ids), Counter(found.ids) - Counter(wanted.ids)
        must(not lost and not more, f"{len(lost)} ids lost, {len(more)} doubled or new")
        must(found.ids == wanted.ids, "the ids have another order")
        differ = [n for n in wanted.files if wanted.files[n] != found.files.get(n)]
        must(not differ and len(found.files) == len(wanted.files), f"other bytes: {differ[:3]}")
        twice = [part for part, count in runs.committed().items() if count > 1]
        must(not twice, f"committed twice: {twice[:3]}")
        return found

    def words_of(self, way: str) -> tuple[str, ...]:
        """Who works for the command."""
        if way in ("driver", "worker"):
            return ("--ray", self.start_ray())
        return HERE if way == "here" else ("--workers", str(WORKERS))

    def start_ray(self) -> str:
        if self.address is None:
            self.ray = subprocess.Popen(
                [sys.executable, __file__, "--cluster"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | RAY,
            )
            assert self.ray.stdout is not None
            self.address = self.ray.stdout.readline().strip() or None
        must(self.address, "Ray does not start")
        return str(self.address)

    def stop_ray(self) -> None:
        if self.ray is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                self.ray.communicate(timeout=60)
            if self.ray.poll() is None:
                self.ray.kill()


def wait_for(process: Process, happened: Callable[[], object], what: str) -> None:
    """Until it happened. Failed when the process ends before, or nothing comes."""
    until = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None and not happened():
            raise Failed(f"it ended ({process.code}) before {what}: {process.said()[-600:]}")
        must(time.monotonic() < until, f"{what} did not come in {PATIENCE:.0f} seconds")
        time.sleep(0.005)


def kill_commands(bench: Bench, name: str, way: str) -> Iterator[str]:
    """The command is killed at random times, on its own or with a cluster behind it."""
    more = bench.words_of(way)
    workers = 1 if way == "here" else WORKERS
    _, startup, work = bench.undisturbed(name)
    killed = ended = vain = made = 0
    runs = Runs(bench.root, VERBS[name], bench.root / f"{name}-{way}-0", more)
    while killed < bench.kills:
        before, parts_before = len(runs.begun()), sum(runs.committed().values())
        process = runs.start()
        phase = "work" if killed % 2 else "start-up"
        if phase == "work":
            happened = lambda: len(runs.begun()) > before or process.poll() is not None  # noqa: E731, B023
            wait_for(process, happened, "a part")
            pause = bench.random.uniform(0, work / 3)
        else:
            pause = bench.random.uniform(0, startup)
        if not process.ends(pause):
            process.kill()
            killed += 1
            parts, begun = sum(runs.committed().values()), len(runs.begun())
            lost = (begun - before) - (parts - parts_before)
            must(lost <= workers, f"{lost} parts were made in vain, by {workers} workers")
            vain += lost
            told = f"{name}, {way}: kill {killed} in {phase}, {pause:.2f} s in; {parts} parts committed"
            yield f"{told}, {lost} begun in vain"
            continue
        process.done()
        made += bench.same(name, runs).parts  # it was quicker than the kill
        ended += 1
        runs = Runs(bench.root, VERBS[name], bench.root / f"{name}-{way}-{ended}", more)
    runs.start().done()
    found = bench.same(name, runs)
    made += found.parts
    yield (
        f"{name}, {way}: HOLDS. {killed} kills in {ended + 1} outputs: {len(found.ids):,} ids, 0 lost, 0 "
        f"doubled, all bytes equal; {made + vain} parts begun for {made}: {vain} in vain"
    )


def kill_workers(bench: Bench, name: str, way: str) -> Iterator[str]:
    """Workers, here or of the cluster, are killed at random times while the command goes on."""
    from ip2p.base.jobs import RETRIES

    more = bench.words_of(way)
    wanted, _, work = bench.undisturbed(name)
    killed = number = again = made = 0
    while killed < bench.kills:
        runs = Runs(bench.root, VERBS[name], bench.root / f"{name}-{way}-{number}", more)
        process = runs.start()
        dead: set[int] = set()
        hit: Counter[str] = Counter()
        seen = 0
        while killed < bench.kills and process.poll() is None:
            # A worker that begins notes it; then up to two parts' time, for what lies between them.
            wait_for(process, lambda: len(runs.begun()) > seen or process.poll() is not None, "a part")  # noqa: B023
            if process.ends(bench.random.uniform(0, 2 * work / wanted.parts)):
                break
            seen = len(runs.begun())
            alive = {note["pid"]: note["begun"] for note in runs.begun() if note["pid"] not in dead}
            alive.pop(process.pid, None)  # what the command does itself
            # A part that loses its worker too often ends the job, as it should.
            alive = {pid: part for pid, part in alive.items() if hit[part] < RETRIES}
            if not alive:
                continue
            pid = bench.random.choice(sorted(alive))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit[alive[pid]] += 1
                killed += 1
                parts = sum(runs.committed().values())
                yield f"{name}, {way}: kill {killed}, process {pid}; {parts} parts committed"
            dead.add(pid)
        process.done()
        found = bench.same(name, runs)
        vain = len(runs.begun()) - found.parts
        must(vain <= len(dead), f"{vain} parts were made in vain after {len(dead)} kills")
        made += found.parts
        again += vain
        number += 1
    yield (
        f"{name}, {way}: HOLDS. {killed} kills in {number} runs: {len(found.ids):,} ids, 0 lost, 0 doubled, "
        f"all bytes equal; {made + again} parts begun for {made}: {again} in vain"
    )


def full_disk(bench: Bench, name: str, way: str) -> Iterator[str]:
    """A tmpfs that holds half of what the command writes, in a mount namespace of its own."""
    bench.undisturbed(name)
    runs = Runs(bench.root, VERBS[name], bench.root / f"{name}-undisturbed")
    jobs = {path for place in runs.verb.jobs(runs.output) for path in place.rglob("*") if path.is_file()}
    # In pages, as a tmpfs counts.
    written = sum(-(-path.stat().st_size // 4096) * 4096 for path in jobs)
    tool = shutil.which("unshare")
    must(tool, "unshare (util-linux) is not here, so no small disk can be made")
    child = [sys.executable, __file__, "--on-full-disk", str(bench.root), name, str(written // 2)]
    done = subprocess.run([str(tool), "--map-root-user", "--mount", *child], capture_output=True, text=True)
    must(done.returncode == 0, (done.stdout + done.stderr)[-800:])
    yield from done.stdout.splitlines()


def on_full_disk(root: Path, name: str, size: int) -> None:
    bench = Bench(root, 0, 0)
    bench.wanted[name] = left(Runs(root, VERBS[name], root / f"{name}-undisturbed")), 0.0, 0.0
    disk = root / f"{name}-disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    runs = Runs(root, VERBS[name], root / f"{name}-on-disk", disk=disk)
    errors = runs.start().done(code=4)
    must("no space left" in errors and "Traceback" not in errors, f"not told: {errors}")
    from ip2p.base import jobs

    for place in runs.verb.jobs(runs.output):
        if jobs.is_job(place):
            must(jobs.damaged(place) == [], f"damaged: {jobs.damaged(place)}")
            must(not list(place.rglob(".*.parquet")), "a half-written file is left")
    parts = sum(runs.committed().values())
    subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
    runs.start().done()
    bench.same(name, runs)
    print(f"{name}, full disk: HOLDS. exit 4 with {parts} parts whole; with space again all bytes are equal")


WAYS: dict[str, Callable[[Bench, str, str], Iterator[str]]] = {
    "here": kill_commands,
    "processes": kill_commands,
    "process": kill_workers,
    "driver": kill_commands,
    "worker": kill_workers,
    "full-disk": full_disk,
}


# --- small models and tables ----------------------------------------------------------------------


def write_clip(folder: Path) -> None:
    """A random CLIP for the tokenizer beside it."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)


def write_all(root: Path) -> int:
    """All that the commands read."""
    from bench_train import write_model

    (root / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    write_model(root / "painter", part=20, blocks=2, layers=1, text_layers=1, size=16)
    write_clip(root / "painter" / "clip")
    write_lm(root / "lm")
    write_tables(root)
    return 0


def some_triples(count: int) -> list[Any]:
    from ip2p.synth.records import Triple, triple_id

    chosen = [(caption, WEATHERS[k % len(WEATHERS)]) for k, caption in enumerate(CAPTIONS[:count])]
    return [
        Triple(
            id=triple_id(caption, 0),
            caption=caption,
            instruction=f"add {weather}",
            edited_caption=f"{caption}, {weather}",
        )
        for caption, weather in chosen
    ]


def write_lm(folder: Path) -> None:
    """A language model that has just learnt how edits of these captions are written: most of them parse."""
    from ip2p.synth.instruct import completion_of, prompt_of
    from ip2p.synth.tune import Tuning, new_lm, tune_lm

    triples = some_triples(240)
    base = folder.with_name("lm-base")
    texts = [prompt_of(triple.caption) + completion_of(triple) for triple in triples]
    new_lm(texts, base, vocabulary=320, width=64, layers=2, heads=2, context=256)
    tuning = Tuning(epochs=6, rate=5e-3, batch=16)
    tune_lm(base, folder, triples, tuning=tuning, backend="plain", device="cpu", say=lambda line: None)


def write_tables(root: Path, triples: int = 96, pairs: int = 3500) -> None:
    """Triples, and pairs of pictures that have no scores yet."""
    import numpy as np
    import pyarrow.parquet as pq

    from ip2p.data.records import Pair
    from ip2p.synth.filter import pair_row, pair_table
    from ip2p.synth.records import write_triples

    write_triples(root / "triples.parquet", some_triples(triples))
    draw = np.random.default_rng(0)
    (root / "unfiltered").mkdir()
    rows = []
    for number, triple in enumerate(itertools.islice(itertools.cycle(some_triples(len(CAPTIONS))), pairs)):
        before, after = draw.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        words = {"instruction": triple.instruction, "caption": triple.caption}
        pair = Pair(
            id=f"{triple.id}-{number:05}",
            before=before,
            after=after,
            edited_caption=triple.edited_caption,
            **words,
        )
        rows.append(pair_row(pair))
    pq.write_table(pair_table(rows), root / "unfiltered" / "train.parquet", row_group_size=100)


def preload() -> None:
    """Import what the commands import, so that what is forked off has it."""
    import importlib

    import diffusers
    import transformers

    for module in ("ip2p.cli.synth", "ip2p.synth.tune", "ip2p.data.loading"):
        importlib.import_module(module)
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionInstructPix2PixPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPModel", "CLIPTextModel", "CLIPTokenizer", "LlamaForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)


def main() -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.argv[1:2] == ["--cluster"]:
        return cluster()
    preload()
    if sys.argv[1:2] == ["--on-full-disk"]:
        on_full_disk(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VERBS, default=["pairs", "instruct", "filter"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kills", type=int, default=20, help="of each command and way")
    parser.add_argument("--seed", type=int, default=0, help="draws the times of the kills")
    parser.add_argument("--folder", type=Path, help="where all is written; default: the system's")
    asked = parser.parse_args()
    bad: list[str] = []
    held = 0
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        bench = Bench(Path(name), asked.kills, asked.seed)
        bench.prepare()
        try:
            for verb, way in itertools.product(asked.only, asked.ways):
                try_it = WAYS[way]
                try:
                    for line in try_it(bench, verb, way):
                        print(line, flush=True)
                    held += 1
                except Exception as error:
                    if not isinstance(error, Failed):
                        traceback.print_exc()
                    bad.append(f"{verb}, {way}")
                    print(f"{verb}, {way}: FAILS. {error}", flush=True)
                while STARTED:
                    STARTED.pop().kill()
        finally:
            bench.stop_ray()
    print(f"{held} of {held + len(bad)} hold" + (f"; not: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
