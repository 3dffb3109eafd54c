"""Measure what `--auto-mask` does for storybook edits that name one thing, and for those of the whole page.

    python tools/measure_auto_mask.py --count 200 --thresholds 0.4 0.5 0.6

For every threshold, and without a mask: success as `ip2p storybook score` has it; the PSNR outside the
region that the edit may change, once from the mean squared error over all edits (pages kept to the byte
count as no error) and once as the mean of the edits' own, at most 60 dB; how much of the page the masks
take, how much of what the exact answer changes they cover, and how many are the whole page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ip2p.editing.editor import Editor
from ip2p.evaluation.storybook import Case, cases, judge
from ip2p_storybook.edits import GLOBAL_KINDS

MOST = 60.0  # dB; a page that is kept to the byte has no PSNR


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
        row["success"] += verdict.success
        if verdict.preservation is not None:
            apart = output[case.fixed].astype(float) - case.page[case.fixed]
            row["error"] += float((apart**2).sum())
            row["pixels"] += apart.size
            row["psnr"] += min(verdict.preservation, MOST)
            row["kept"] += 1
        mask = np.asarray(result.info["mask"]) / 255 if threshold is not None else np.ones(output.shape[:2])
        changed = (case.exact != case.page).any(axis=-1)
        row["area"] += float(mask.mean())
        row["covered"] += float(mask[changed].mean())
        row["whole"] += float(mask.min() == 1)
    return row


def shown(name: str, row: dict[str, float]) -> str:
    count = row["count"]
    line = f"{name:>10}{row['success'] / count:>10.1%}"
    if row["pixels"]:
        error = row["error"] / row["pixels"]
        pooled = MOST if error == 0 else min(MOST, 10 * math.log10(255**2 / error))
        line += f"{pooled:>12.2f} dB{row['psnr'] / row['kept']:>9.2f} dB"
    else:
        line += f"{'-':>15}{'-':>12}"
    return line + f"{row['area'] / count:>9.1%}{row['covered'] / count:>10.1%}{row['whole'] / count:>10.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="storybook")
    parser.add_argument(
        "--count", type=int, default=200, help="edits of one thing, and a quarter of the page"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, help="side of a page; default: what the model was trained at")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text-cfg", type=float)
    parser.add_argument("--image-cfg", type=float)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file with the sums")
    args = parser.parse_args()
    editor = Editor.load(args.model, device=args.device, dtype=args.dtype)
    size = args.size or editor.bundle.card.native_size
    tables = {}
    for title, count, whole in (
        ("edits of one thing", args.count, False),
        ("edits of the whole page", args.count // 4, True),
    ):
        rows: dict[str, dict[str, float]] = {}
        remaining, first = chosen(count, whole, args.seed, size, args.split), 0
        while batch := list(islice(remaining, args.batch_size)):
            for threshold in (None, *args.thresholds):
                name = "no mask" if threshold is None else f"{threshold:g}"
                row = measure(editor, batch, first, threshold, args)
                before = rows.get(name, dict.fromkeys(row, 0.0))
                rows[name] = {key: before[key] + value for key, value in row.items()}
            first += len(batch)
        print(f"\n{count} {title} at {size} px, seed {args.seed}, {args.steps} steps\n")
        heads = ("threshold", 10), ("success", 10), ("PSNR outside", 15), ("mean", 12)
        heads += ("area", 9), ("covered", 10), ("whole", 10)
        print("".join(f"{head:>{width}}" for head, width in heads))
        for name, row in rows.items():
            print(shown(name, row), flush=True)
        tables[title] = rows
    if args.out:
        args.out.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
