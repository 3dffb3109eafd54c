"""Kill and break the commands that take long, and compare what comes out with an undisturbed run.

    python -m benchmarks.crash                              # every target and way, 20 kills of each: an hour
    python -m benchmarks.crash batch convert --kills 5
    python -m benchmarks.crash jobs --ways worker           # jobs: instruct, pairs and filter

All run on small random models, on the CPU in fp32, where a run has one right result, to the byte.

    kills       kill -9 of the command at random times: half in its start-up, half in its work
    processes   the same, with processes beside it
    process     kill -9 of those processes; the command goes on
    driver      kill -9 of the command, with workers on a Ray cluster
    worker      kill -9 of those workers; the command goes on
    full-disk   a disk that is too small: exit 4, and it goes on when there is space (needs `unshare`)
    sigterm     exit 143, and it goes on
    two         a second command in the same folder exits 2
    half, truncated, nan, changed   of train: 2N against N + kill + N, damaged checkpoints, gradients that
                are not finite, settings that change when a run goes on

The target `server` lets `ip2p synth instruct` ask a `transformers serve` that is killed half-way. Each trial
prints HOLDS or FAILS; the exit code is 1 if one fails.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common import ENVIRONMENT, Failed, Process, new_parser

os.environ |= ENVIRONMENT  # before torch is imported

from benchmarks.crash import harness, server, train
from benchmarks.crash.targets import GROUPS, TARGETS, preload, write_inputs

WAYS = harness.WAYS | train.WAYS


def trials(bench: harness.Bench, names: list[str], ways: list[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """The title and lines of each trial."""
    for name in names:
        if name == "server":
            yield name, server.kill_server(bench.root)
            continue
        target = TARGETS[name]
        possible = (*target.ways, *(train.WAYS if name == "train" else ()))
        for way in (way for way in possible if way in ways):
            yield f"{name}, {way}", WAYS[way](bench, target, way)


def main() -> int:
    if sys.argv[1:2] == ["--cluster"]:
        return harness.run_cluster()
    preload()
    if sys.argv[1:2] == ["--on-small-disk"]:
        root, name, size = sys.argv[2:]
        harness.on_disk(harness.Bench(Path(root), 0, random.Random(0)), TARGETS[name], int(size))
        return 0
    parser = new_parser(__doc__)
    every = [*TARGETS, "server"]
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join([*GROUPS, *every])}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kills", type=int, default=20, help="for each target and way")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    args = parser.parse_args()
    names = [name for word in args.targets or every for name in GROUPS.get(word, (word,))]
    if unknown := set(names) - set(every):
        parser.error(f"no such target: {', '.join(unknown)}; targets: {', '.join([*GROUPS, *every])}")
    failed: list[str] = []
    held = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = harness.Bench(Path(folder), args.kills, random.Random(args.seed))
        # In a process of its own, since the others are forked from this one, which must not use a model.
        Process(partial(write_inputs, bench.root, names), bench.root / "inputs.txt").finish()
        try:
            for title, lines in trials(bench, names, args.ways):
                try:
                    for line in lines:
                        print(line, flush=True)
                    held += 1
                except Exception as error:
                    if not isinstance(error, Failed):
                        traceback.print_exc()
                    failed.append(title)
                    print(f"{title}: FAILS. {error}", flush=True)
                Process.kill_all()
        finally:
            bench.stop_ray()
    print(f"{held} of {held + len(failed)} hold" + (f"; not: {'; '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
