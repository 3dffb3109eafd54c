"""Break `ip2p train` in every way that a long run meets, and print what came of it.

    python tools/crash_train.py                          # all, with 20 kills: some minutes
    python tools/crash_train.py --only kills --kills 5

It drives the command itself on a small random model and 24 storybook pairs, on the CPU in fp32, where two
runs of the same steps must end with the same bits: weights, moving average and optimizer. Each line of the
table is a fact that was checked; the exit code is 1 when one of them does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_train import write_model, write_pairs

STEPS = 40
SAVE_EVERY = 2
PATIENCE = 600.0  # seconds until something that must happen is given up


class Failed(Exception):
    """What was promised does not hold."""


def must(holds: object, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


class Bench:
    """The small model, its pairs, and how the command is called on them."""

    def __init__(self, root: Path, kills: int, seed: int) -> None:
        self.root, self.kills, self.random = root, kills, random.Random(seed)
        self.model, self.data, self.cache = root / "model", root / "pairs", root / "cache"
        self.kept: dict[str, Any] | None = None
        self.seconds = 0.0
        self.startup = 0.0

    def prepare(self) -> None:
        write_model(self.model, part=8, blocks=2, layers=1, text_layers=1, size=32)
        write_pairs(self.data, count=24, size=32)

    def command(self, output: Path, *more: object, base: Path | None = None, steps: int = STEPS) -> list[str]:
        return [
            *(sys.executable, "-m", "ip2p", "train", "--data", str(self.data)),
            *("--base", str(base or self.model), "--output", str(output), "--steps", str(steps)),
            *("--size", "32", "--batch", "4", "--micro-batch", "2", "--precision", "fp32", "--device", "cpu"),
            *("--dtype", "fp32", "--cache", str(self.cache), "--save-every", str(SAVE_EVERY)),
            *("--validate-every", "0", "--track", "none", *map(str, more)),
        ]

    def start(self, *args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return subprocess.Popen(
            self.command(*args, **kwargs),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that its workers can be killed with it
        )

    def run(self, *args: Any, code: int = 0, **kwargs: Any) -> str:
        """Run the command to its end; returns stderr. Failed unless it exits with `code`."""
        process = self.start(*args, **kwargs)
        _, errors = process.communicate(timeout=PATIENCE)
        must(process.returncode == code, f"exit {process.returncode}, not {code}: {errors[-400:]}")
        return errors

    def wanted(self) -> dict[str, Any]:
        """The state at the end of a run that nothing disturbs; it is made at the first call."""
        if self.kept is None:
            output = self.root / "undisturbed"
            self.run(self.root / "warm-up", steps=1)  # so that the cache is not part of the times
            started = time.monotonic()
            process = self.start(output)
            wait_for(process, lambda: listed(output), "its first checkpoint")
            self.startup = time.monotonic() - started
            _, errors = process.communicate(timeout=PATIENCE)
            self.seconds = time.monotonic() - started
            must(process.returncode == 0, f"the undisturbed run exits {process.returncode}: {errors[-400:]}")
            self.kept = state_of(output)
            must(self.kept["step"] == STEPS, f"it ends at step {self.kept['step']}")
        return self.kept

    def same(self, output: Path) -> None:
        """Failed unless the run in `output` ended as the undisturbed one, to the bit."""
        wanted, found = self.wanted(), state_of(output)
        for part in ("step", "model", "ema", "optimizer"):
            where = difference(wanted[part], found[part], part)
            must(where is None, f"{where} differs from the undisturbed run's")
        ours, theirs = (next((f / "unet").glob("*.safetensors")) for f in (output, self.root / "undisturbed"))
        must(ours.read_bytes() == theirs.read_bytes(), "the written UNet differs from the undisturbed run's")


def state_of(output: Path) -> dict[str, Any]:
    from ip2p.training.checkpoints import Checkpoints

    state = Checkpoints(output / "training").load()
    must(state is not None, f"no checkpoint in {output}")
    assert state is not None
    return state


def difference(a: Any, b: Any, name: str) -> str | None:
    """The name of the first part in which two states differ, None when they are equal."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return name
        return next((d for k in a if (d := difference(a[k], b[k], f"{name}.{k}"))), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return next((d for k, (x, y) in enumerate(pairs) if (d := difference(x, y, f"{name}.{k}"))), None)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    return None if a == b else name


def listed(output: Path) -> list[int]:
    """The steps whose checkpoints the manifest lists."""
    from ip2p.training.checkpoints import Checkpoints

    return [row["step"] for row in Checkpoints(output / "training").rows()]


def wait_for(process: subprocess.Popen[str], happened: Callable[[], object], what: str) -> None:
    """Until it happened. Failed when the process ends before, or nothing comes."""
    until = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None and not happened():
            raise Failed(f"it ended ({process.returncode}) before {what}: {process.communicate()[1][-400:]}")
        must(time.monotonic() < until, f"{what} did not come in {PATIENCE:.0f} seconds")
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# --- what is checked ----------------------------------------------------------------------------


def kills(bench: Bench) -> Iterator[str]:
    """kill -9 at random times: of its start-up, and of its training"""
    bench.wanted()
    times: dict[str, list[int]] = {"start-up": [], "training": []}
    ended, output = 0, bench.root / "killed-0"
    while (killed := sum(map(len, times.values()))) < bench.kills:
        before = listed(output)
        process = bench.start(output)
        # Most of a short run is start-up, so every other kill waits until it is over.
        phase = "training" if killed % 2 else "start-up"
        if phase == "training":
            more = lambda: listed(output) != before or process.poll() is not None  # noqa: E731, B023
            wait_for(process, more, "a checkpoint more")
            longest = (bench.seconds - bench.startup) / 4  # less than what is left, mostly
        else:
            longest = bench.startup
        try:
            process.wait(bench.random.uniform(0, longest))
        except subprocess.TimeoutExpired:
            kill(process)
            times[phase].append(max(listed(output), default=0))
            continue
        errors = process.communicate()[1]
        must(process.returncode == 0, f"exit {process.returncode} after {killed} kills: {errors[-400:]}")
        bench.same(output)  # it was quicker than the kill: one run more is compared
        ended += 1
        output = bench.root / f"killed-{ended}"
    bench.run(output)
    bench.same(output)
    told = "; ".join(
        f"in {phase} with step {', '.join(map(str, steps))} saved" for phase, steps in times.items()
    )
    yield f"{killed} kills in {ended + 1} runs ({told}): bit-identical"


def half(bench: Bench) -> Iterator[str]:
    """2N steps against N, kill -9, N"""
    bench.wanted()
    output = bench.root / "half"
    process = bench.start(output)
    wait_for(process, lambda: STEPS // 2 in listed(output), f"step {STEPS // 2}")
    kill(process)
    must(max(listed(output)) < STEPS, "it had ended before the kill, which thus tried nothing")
    bench.run(output)
    bench.same(output)
    yield f"{STEPS} against {STEPS // 2} + kill + {STEPS // 2}: bit-identical"


def truncated(bench: Bench) -> Iterator[str]:
    """the newest checkpoint is cut off"""
    output = bench.root / "truncated"
    bench.run(output, steps=STEPS // 2)
    before, newest = sorted((output / "training").glob("step-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    errors = bench.run(output)
    must(newest.name in errors and "going on from the checkpoint before" in errors, f"no warning: {errors}")
    bench.same(output)
    yield f"{newest.name} has half its bytes: told, {before.name} taken, bit-identical in the end"
    for file in (output / "training").glob("step-*.pt"):
        os.truncate(file, 100)
    errors = bench.run(output, code=2, steps=2 * STEPS)
    must("no checkpoint" in errors, f"not told: {errors}")
    yield "all checkpoints damaged: exit 2, nothing is begun anew over them"


def sigterm(bench: Bench) -> Iterator[str]:
    """SIGTERM saves"""
    output = bench.root / "sigterm"
    process = bench.start(output)
    wait_for(process, lambda: listed(output), "its first checkpoint")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    must(process.returncode == 143, f"exit {process.returncode}, not 143: {errors[-400:]}")
    newest = max(listed(output))
    must(f"saved at step {newest};" in errors, f"step {newest} is the newest, and it said: {errors[-400:]}")
    bench.run(output)
    bench.same(output)
    yield f"exit 143, saved at step {newest}, goes on: bit-identical"


def nan(bench: Bench) -> Iterator[str]:
    """gradients that are not finite, from instructions with one word"""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    from ip2p.data.loading import open_source

    base = bench.root / "poisoned"
    shutil.copytree(bench.model, base, dirs_exist_ok=True)
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    source = open_source(str(bench.data))
    told = [source[row].instruction for row in range(len(source))]
    words = sorted({word for text in told for word in text.split()})
    # A word of a third of the instructions: most batches then hold one, and not every sample is one.
    share = {word: sum(word in text.split() for text in told) / len(told) for word in words}
    word = min(words, key=lambda word: abs(share[word] - 0.3))
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    numbers = [i for i in tokenizer(word).input_ids if i not in tokenizer.all_special_ids]
    with torch.no_grad():
        encoder.get_input_embeddings().weight[numbers] = 1e38
    encoder.save_pretrained(base / "text_encoder")
    output = bench.root / "nan"
    errors = bench.run(output, base=base, code=3)
    bad = output / "training" / "not-applied.jsonl"
    must(str(bad) in errors, f"the file is not named: {errors[-400:]}")
    row = json.loads(bad.read_text().splitlines()[0])
    must(len(row["ids"]) == 4, f"ids of the batch: {row}")
    state = state_of(output)
    must(state["step"] == row["step"], f"saved at {state['step']}, and step {row['step']} was not finite")
    finite = all(torch.isfinite(t).all() for part in ("model",) for t in state[part].values())
    must(finite, "weights that are not finite were saved")
    yield f"stops at step {row['step']} with exit 3, its {len(row['ids'])} ids saved, weights finite"
    bench.run(output, "--nan-steps", 1000, base=base)
    weights = state_of(output)["model"].values()
    must(all(torch.isfinite(tensor).all() for tensor in weights), "weights that are not finite in the end")
    count = len({json.loads(line)["step"] for line in bad.read_text().splitlines()})
    yield f"--nan-steps 1000: {count} of {STEPS} steps not applied, weights finite"


def two(bench: Bench) -> Iterator[str]:
    """two runs in one folder"""
    output = bench.root / "two"
    first = bench.start(output)
    wait_for(first, lambda: listed(output), "its first checkpoint")
    os.killpg(first.pid, signal.SIGSTOP)  # so that it does not end before the other looks
    errors = bench.run(output, code=2)
    must("another ip2p is writing into" in errors, f"not told: {errors}")
    os.killpg(first.pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=PATIENCE)
    must(first.returncode == 0, f"the first exits {first.returncode}: {errors[-400:]}")
    bench.same(output)
    yield "the second exits 2, the first ends undisturbed"


def changed(bench: Bench) -> Iterator[str]:
    """another setting when a run goes on"""
    output = bench.root / "changed"
    bench.run(output, steps=SAVE_EVERY)
    for words, name in (
        (("--lr", "2e-4"), "lr"),
        (("--batch", "8"), "batch"),
        (("--seed", "1"), "seed"),
        (("--text-null", "0.1"), "text_null"),
        (("--no-flip",), "no_flip"),
    ):
        errors = bench.run(output, *words, code=2)
        must(name in errors, f"{name} is not named: {errors[-400:]}")
    other = bench.root / "other-pairs"
    if not other.exists():
        write_pairs(other, count=20, size=32)
    errors = bench.run(output, "--data", other, code=2)
    must("data" in errors, f"--data is not named: {errors[-400:]}")
    bench.run(output)
    bench.same(output)
    yield "lr, batch, seed, text_null, no_flip, the data's content: each refused by name with exit 2"


def full_disk(bench: Bench) -> Iterator[str]:
    """the disk is full, on a tmpfs in a mount namespace of its own"""
    bench.wanted()
    size = max(p.stat().st_size for p in (bench.root / "undisturbed" / "training").glob("step-*.pt"))
    child = [sys.executable, __file__, "--on-full-disk", str(bench.root), str(size)]
    tool = shutil.which("unshare")
    must(tool, "unshare (util-linux) is not here, so no small disk can be made")
    done = subprocess.run(
        [str(tool), "--map-root-user", "--mount", *child],
        capture_output=True,
        text=True,
    )
    must(done.returncode == 0, done.stderr[-600:])
    yield from done.stdout.splitlines()


def on_full_disk(root: Path, size: int) -> None:
    """Inside the namespace: two checkpoints fit on the disk, a third beside them does not."""
    bench = Bench(root, 0, 0)
    bench.kept = state_of(root / "undisturbed")
    disk = root / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={int(2.5 * size)}", "tmpfs", str(disk)], check=True)
    output = disk / "editor"
    errors = bench.run(output, code=4)
    must("space" in errors, f"not told: {errors}")
    must("Traceback" not in errors, errors)
    steps = listed(output)
    must(steps == [SAVE_EVERY, 2 * SAVE_EVERY], f"listed: {steps}")
    must(state_of(output)["step"] == 2 * SAVE_EVERY, "the old state is not intact")
    must(not list((output / "training").glob(".step-*")), "a half-written file is left")
    print(f"exit 4 at the third checkpoint; steps {steps} intact, nothing half-written left")
    larger = int(20 * size)
    subprocess.run(["mount", "-o", f"remount,size={larger}", str(disk)], check=True)
    bench.run(output)
    bench.same(output)
    print("with space again the same command goes on: bit-identical")


CHECKS: dict[str, Callable[[Bench], Iterator[str]]] = {
    "kills": kills,
    "half": half,
    "truncated": truncated,
    "sigterm": sigterm,
    "full-disk": full_disk,
    "nan": nan,
    "two": two,
    "changed": changed,
}


def main() -> int:
    if sys.argv[1:2] == ["--on-full-disk"]:
        on_full_disk(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="draws the times of the kills")
    parser.add_argument("--folder", type=Path, help="where the runs are written; default: the system's")
    asked = parser.parse_args()
    rows, bad = [], 0
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        bench = Bench(Path(name), asked.kills, asked.seed)
        bench.prepare()
        for check in asked.only:
            print(f"{check} …", file=sys.stderr, flush=True)
            title = " ".join((CHECKS[check].__doc__ or check).split())
            try:
                for fact in CHECKS[check](bench):
                    rows.append((title, "holds", fact))
            except Exception as error:
                if not isinstance(error, Failed):
                    traceback.print_exc()
                rows.append((title, "FAILS", f"{error}"))
                bad += 1
            print(f"  {rows[-1][1]}: {rows[-1][2]}", file=sys.stderr, flush=True)
    print("| what happens | | what came of it |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in row)} |")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
