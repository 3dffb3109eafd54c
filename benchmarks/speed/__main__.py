"""How fast this machine edits, trains, serves and loads, and how much memory it takes.

python -m benchmarks.speed                     # edit: one table for this machine
python -m benchmarks.speed train|serve|loading|memory|peaks|growth --help
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.common import new_parser

TARGETS = ("edit", "train", "serve", "loading", "memory", "peaks", "growth")


def main(words: list[str]) -> int:
    if words[:1] == ["--child"]:
        from benchmarks.speed.train import run_child

        times, device, threads, *rest = words[1:]
        run_child(Path(times), device, int(threads), rest)
        return 0
    name = words.pop(0) if words[:1] and words[0] in TARGETS else "edit"
    target = importlib.import_module(f"benchmarks.speed.{name}")
    parser = new_parser(target.__doc__)
    target.add_options(parser)
    return int(target.run(parser.parse_args(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
