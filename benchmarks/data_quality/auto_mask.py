"""The effect of `--auto-mask` on storybook edits of one thing, and on edits of the whole page.

    python -m benchmarks.data_quality auto-mask --count 200 --thresholds 0.4 0.5 0.6

For every threshold, and without a mask: success ("nearest" in `ip2p storybook score`); the PSNR outside the
region that the edit may change, once from the mean squared error over all edits (pages kept to the byte
count as no error) and once as the mean of the edits' own, at most 60 dB; how much of the page the masks
take, how much of what the exact answer changes they cover, and how many are the whole page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import table
from ip2p.editing.editor import Editor
from ip2p.evaluation.storybook import Case, cases, judge
from ip2p_storybook.edits import GLOBAL_KINDS
from ip2p_storybook.metrics import MAX_PSNR


def chosen(count: int, whole: bool, seed: int, size: int, split: str) -> Iterator[Case]:
    """`count` cases of the whole page, or of one thing; the ones of two edits at once are neither."""
    kinds = (case for case in cases(10**9, seed, size, split) if case.edit.kind != "two")
    return islice((case for case in kinds if (case.edit.kind in GLOBAL_KINDS) == whole), count)


def measure(
    editor: Editor, some: list[Case], first: int, threshold: float | None, args: argparse.Namespace
) -> dict[str, float]:
    """The numbers of one row of the table, as sums over `some`, whose seeds count up from `first`."""
    results = editor.edit_batch(
        [Image.fromarray(case.page) for case in some],
        [case.edit.instruction for case in some],
        seeds=[args.seed * 1_000_003 + first + number for number in range(len(some))],
        steps=args.steps,
        text_cfg=args.text_cfg,
        image_cfg=args.image_cfg,
        auto_mask=threshold,
    )
    row: dict[str, float] = dict.fromkeys(
        ("count", "success", "error", "pixels", "psnr", "kept", "area", "covered", "whole"), 0.0
    )
    for case, result in zip(some, results, strict=True):
        output = np.asarray(result)
        verdict = judge(case, output)
        row["count"] += 1
        row["success"] += verdict.nearest
        if verdict.preservation is not None:
            apart = output[case.fixed].astype(float) - case.page[case.fixed]
            row["error"] += float((apart**2).sum())
            row["pixels"] += apart.size
            row["psnr"] += min(verdict.preservation, MAX_PSNR)
            row["kept"] += 1
        mask = np.asarray(result.info["mask"]) / 255 if threshold is not None else np.ones(output.shape[:2])
        changed = (case.exact != case.page).any(axis=-1)
        row["area"] += float(mask.mean())
        row["covered"] += float(mask[changed].mean())
        row["whole"] += float(mask.min() == 1)
    return row


def row_of(name: str, sums: dict[str, float]) -> list[str]:
    count = sums["count"]
    pooled, mean = "-", "-"
    if sums["pixels"]:
        error = sums["error"] / sums["pixels"]
        pooled = f"{MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / error)):.2f} dB"
        mean = f"{sums['psnr'] / sums['kept']:.2f} dB"
    shares = [f"{sums[key] / count:.1%}" for key in ("success", "area", "covered", "whole")]
    return [name, shares[0], pooled, mean, *shares[1:]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="storybook")
    parser.add_argument(
        "--count", type=int, default=200, help="edits of one thing; a quarter as many of pages"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, help="side of a page; default: the model's native size")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--text-cfg", type=float)
    parser.add_argument("--image-cfg", type=float)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the sums")


def run(args: argparse.Namespace) -> None:
    editor = Editor.load(args.model, device=args.device, dtype=args.dtype)
    steps = editor.resolved(changes={"steps": args.steps}).steps
    size = args.size or editor.bundle.card.native_size
    heads = ("threshold", "success", "PSNR outside", "mean PSNR", "area", "covered", "whole")
    tables = {}
    for title, count, whole in (
        ("edits of one thing", args.count, False),
        ("edits of the whole page", args.count // 4, True),
    ):
        rows: dict[str, Counter[str]] = {}
        remaining, first = chosen(count, whole, args.seed, size, args.split), 0
        while batch := list(islice(remaining, args.batch_size)):
            for threshold in (None, *args.thresholds):
                name = "no mask" if threshold is None else f"{threshold:g}"
                rows.setdefault(name, Counter()).update(measure(editor, batch, first, threshold, args))
            first += len(batch)
        print(f"\n{count} {title} at {size} px, seed {args.seed}, {steps} steps\n")
        print(table(heads, [row_of(name, sums) for name, sums in rows.items()]), flush=True)
        tables[title] = rows
    if args.out:
        args.out.write_text(json.dumps(tables, indent=1) + "\n")
