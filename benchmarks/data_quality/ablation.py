"""What the filter does for the editor: the paper's ablation, on storybook pairs, where the truth is known.

    python -m benchmarks.data_quality ablation -o ablation --edits 1000 --candidates 8 --steps 2000

From the same edits in words three sets of pairs are made: every candidate that the painter draws
(`unfiltered`), those that the filter keeps (`filtered`), and the exact pages (`exact`). On each, `ip2p train`
trains an editor with the same start, settings, steps and seed, and all are scored on the same edits. The
start is the painter without the input channels for the picture: a text-to-image model, which `ip2p train`
widens again, as in the paper.

The edits are of training's pages and phrasings; the scored ones are held out from both. Everything is in the
folder, and the same call resumes. --pairs and --kept name existing data.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import run_ip2p, table
from benchmarks.data_quality.stats import Share, bootstrap, share_of, signed_percent
from ip2p.base.files import make_folder, write_text
from ip2p.base.terminal import progress
from ip2p.editing.editor import Editor
from ip2p.evaluation.storybook import judge, score
from ip2p.models.save import save_editor
from ip2p.settings import EditSettings
from ip2p.synth.pairs import open_painter
from ip2p.synth.settings import PAIRS_STORYBOOK
from ip2p.training.storybook.pairs import write_exact_triples, write_pairs
from ip2p_storybook.triples import exact_triples

ARMS = ("unfiltered", "filtered", "exact")


def write_base(model: str, folder: Path) -> None:
    """The painter as a text-to-image model: its UNet answers as it did when it was shown no picture."""
    if (folder / "model_index.json").exists():
        return
    bundle = open_painter(model, device="cpu", dtype=torch.float32)
    cut_picture(bundle.unet, bundle.vae.config.latent_channels)
    save_editor(bundle, folder, dtype=torch.float32)


def cut_picture(unet: Any, channels: int) -> None:
    """Take the input channels beyond `channels` from a UNet, in place."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding).to(
        old.weight
    )
    with torch.no_grad():
        new.weight.copy_(old.weight[:, :channels])
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def make_pairs(args: argparse.Namespace) -> dict[str, Path]:
    """The three sets; each is a job that goes on, or a file that is written whole."""
    out: Path = args.out
    triples, exact = out / "triples.parquet", out / "exact.parquet"
    # Two edits of a page may come out as the same words; a job takes each once.
    edits = {t.id: t for t in exact_triples(args.edits, args.seed, "train")}.values()
    if not triples.exists():
        write_exact_triples(edits, triples)
    if not exact.exists():
        write_pairs((triple.edit for triple in edits), exact, size=args.size)
    pairs, kept = args.pairs or out / "pairs", args.kept or out / "kept"
    if args.pairs is None:
        drawn: tuple[Any, ...] = ("--most", args.candidates, "--enough", 0, "--risk", 0, "--keep", "all")
        drawn += ("--steps", args.pair_steps)
        run_ip2p("synth", "pairs", triples, "-o", pairs, "--model", args.model, *drawn)
    if args.kept is None:
        least = [(f"--{n}", getattr(args, n)) for n in ("image", "caption", "directional")]
        given = chain.from_iterable((flag, value) for flag, value in least if value is not None)
        run_ip2p("synth", "filter", pairs, "-o", kept, *given)
    return {"unfiltered": pairs, "filtered": kept, "exact": exact}


def train(args: argparse.Namespace, name: str, data: Path, base: Path) -> Path:
    """An arm's editor; a call for one that is done returns at once."""
    folder: Path = args.out / name
    settings = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "schedule": args.schedule}
    settings |= {"warmup": args.warmup, "seed": args.seed, "ema": args.ema}
    options = chain.from_iterable((f"--{flag}", value) for flag, value in settings.items())
    run_ip2p(
        *("train", "--data", data, "--base", base, "--output", folder, *options),
        *("--validate-every", 0, "--held-out", 0, "--save-every", args.save_every, "--track", "none"),
        *("--cache", args.out / "cache", "--dtype", "fp32"),
    )
    return folder


def scored(args: argparse.Namespace, name: str, model: Path | str) -> dict[str, Any]:
    """What the score says of an editor, kept in a file: of every edit whether it is right."""
    settings = {
        n: getattr(args, n) for n in ("count", "score_seed", "steps", "batch", "lr", "text_cfg", "image_cfg")
    }
    path: Path = args.out / f"score-{name}.json"
    if path.exists() and (old := json.loads(path.read_text()))["settings"] == settings:
        return old  # type: ignore[no-any-return]
    rows: list[Any] = []
    with progress(f"scoring {name}", args.count) as advance:
        found = score(
            Editor.load(str(model), device=args.device),
            count=args.count,
            seed=args.score_seed,
            settings=EditSettings(text_cfg=args.text_cfg, image_cfg=args.image_cfg),
            splits=("test",),
            advance=advance,
            rows=rows,
            keep_rows=args.count,
        )
    verdicts = [judge(case, output) for case, output in rows]
    found |= {
        "settings": settings,
        "kinds": [verdict.kind for verdict in verdicts],
        "right": [verdict.nearest for verdict in verdicts],
        "kept": [verdict.preservation for verdict in verdicts],
    }
    write_text(path, json.dumps(found) + "\n")
    return found


def difference(one: list[bool], two: list[bool]) -> str:
    """How many more of the same edits the first gets right."""
    apart = np.asarray(one, dtype=float) - np.asarray(two, dtype=float)
    return signed_percent(*bootstrap(lambda picks: float(apart[picks].mean()), len(apart), rounds=4000))


def rows_of(source: Path) -> int:
    """How many pairs a set has."""
    from ip2p.data.loading import open_source

    return len(open_source(str(source)))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="storybook", help="the painter, and what the start is cut from")
    parser.add_argument("--edits", type=int, default=1000, help="in words, for all three sets")
    parser.add_argument("--candidates", type=int, default=8, help="pairs drawn of each")
    parser.add_argument("--pair-steps", type=int, default=PAIRS_STORYBOOK["steps"])
    for name in ("image", "caption", "directional"):
        parser.add_argument(f"--{name}", type=float, help="least similarity; default: the storybook's")
    parser.add_argument("--pairs", type=Path, help="candidates that are there: ip2p synth pairs --keep all")
    parser.add_argument("--kept", type=Path, help="what ip2p synth filter kept of them")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each arm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--count", type=int, default=200, help="edits that are scored")
    parser.add_argument("--score-seed", type=int, default=0)
    parser.add_argument("--text-cfg", type=float, help="default: the card's")
    parser.add_argument("--image-cfg", type=float, help="default: the card's")
    parser.add_argument("--seed", type=int, default=0, help="of the edits, and of training")
    parser.add_argument("--size", type=int, default=128, help="of the exact pages")
    parser.add_argument("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    make_folder(args.out)
    base = args.out / "base"
    write_base(args.model, base)
    data = make_pairs(args)
    found = {}
    for name in args.arms:
        found[name] = scored(args, name, train(args, name, data[name], base))
    rows = []
    for name, result in found.items():
        right: Share = share_of(result["right"])
        kept = result["splits"]["test"]["model"]["overall"]["preservation"]
        apart = (
            "-"
            if name == "unfiltered" or "unfiltered" not in found
            else difference(result["right"], found["unfiltered"]["right"])
        )
        rows.append(
            [
                name,
                f"{rows_of(data[name]):,}",
                right,
                apart,
                "-" if kept is None else f"{kept['value']:.1f} dB",
            ]
        )
    first = next(iter(found.values()))["splits"]["test"]
    for name in ("copy", "ceiling"):
        rows.append([name, "-", f"{first[name]['overall']['nearest']['value']:.1%}", "-", "-"])
    text = "\n".join(
        [
            f"{args.steps:,} steps of {args.batch} from the painter without its picture channels; "
            f"{args.count} edits, text CFG {next(iter(found.values()))['text_cfg']:g}, "
            f"image CFG {next(iter(found.values()))['image_cfg']:g}",
            "",
            table(("trained on", "pairs", "right", "more than unfiltered", "page kept"), rows),
            "",
        ]
    )
    print(f"\n{text}")
    write_text(args.out / "ablation.md", text)
