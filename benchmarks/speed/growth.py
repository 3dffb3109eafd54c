"""Seconds and peak memory of edits as they grow: pixels, results at once, and pictures in a folder.

    python -m benchmarks.speed growth
    python -m benchmarks.speed growth --pixels 256 512 --count 1 2 --pictures 10 20

A random model with a quarter of SD 1.5's widths, one step. Each row is a new process that edits once to warm
up. "per unit" is seconds per pixel, result or picture, relative to the first row: 1.0 is linear growth.
Memory is the peak of the edits beside the loaded model. Linux. Other work on the machine slows this down many
times, since the threads of an edit wait for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine_name, measure_apart, table, write_model
from benchmarks.speed.peaks import Peak

SMALL = 64  # pixels along a side of a folder's pictures


def measure_growth(model: str, pixels: int, count: int, pictures: int) -> dict[str, float]:
    """In a process of its own: seconds and bytes of one call, or of a folder if `pictures` is not 0."""
    from PIL import Image

    from ip2p.base.devices import return_freed_memory
    from ip2p.editing.editor import Editor

    editor = Editor.load(model, device="cpu")
    picture = Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB")

    def edit(count: int) -> None:
        editor.edit(picture, "make it night", seeds=range(count), steps=1, size=pixels)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures):
            picture.rotate(number).save(Path(folder) / f"{number:04}.png")
        edit(1)
        return_freed_memory()
        with Peak("cpu") as peak:
            begun = time.perf_counter()
            if pictures:
                from ip2p.cli.main import main

                words = ["edit", folder, "make it night", "-o", f"{folder}/out", "--model", model]
                if code := main([*words, "--steps", "1", "--size", str(pixels)]):
                    raise SystemExit(code)
            else:
                edit(count)
            seconds = time.perf_counter() - begun
    return {"seconds": seconds, "bytes": peak.bytes}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--count", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--pictures", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.child:
        model, *numbers = args.child
        print(json.dumps(measure_growth(model, *map(int, numbers))))
        return 0
    series = {
        "pixels along a side": [(side, (side, 1, 0), side**2 / 1e6) for side in args.pixels],
        "results at once, 256 px": [(count, (256, count, 0), count) for count in args.count],
        f"pictures in a folder, {SMALL} px": [(many, (SMALL, 1, many), many) for many in args.pictures],
    }
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder) / "editor"
        write_model(model, part=4, size=256, in_channels=8, dtype="bf16")
        for name, points in series.items():
            first = 0.0
            for value, work, units in points:
                found = measure_apart("growth", "--child", model, *work)
                each = found["seconds"] / units
                first = first or each
                seconds, memory = f"{found['seconds']:.3g}", f"{found['bytes'] / 1e6:.0f}"
                rows.append([name, value, seconds, f"{each / first:.2f}", memory])
                print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{machine_name()}; a quarter of SD 1.5's widths, 1 step\n")
    print(table(["", "", "s", "per unit", "MB"], rows))
    return 0
