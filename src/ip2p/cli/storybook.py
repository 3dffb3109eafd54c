"""`ip2p storybook draw | build | score`: draw the storybook, train and score the storybook model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from PIL import Image

from ip2p.base.errors import InputError
from ip2p.base.files import check_output, make_folder, replacing, write_text
from ip2p.base.terminal import progress
from ip2p.pictures.images import contact_sheet
from ip2p.settings import (
    COMMON,
    MAX_SEED,
    DeviceSettings,
    DTypeSettings,
    EditSettings,
    OverwriteSettings,
    RunSettings,
    ScaleSettings,
    ScheduleName,
    Seed,
    SharePair,
    Split,
    StepSettings,
    Texts,
    run_json,
    setting,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ip2p_storybook.edits import Edit


class DrawConfig(RunSettings, OverwriteSettings):
    """Draw pages of the storybook: ip2p storybook draw --count 16 -o pages"""

    out: Path | None = setting(None, "output folder for the pictures", group=COMMON, flags=("-o",))
    count: int = setting(
        16, "number of pages, pairs, captions and triples", ge=1, le=10_000_000, group=COMMON
    )
    seed: int = setting(
        0, "seed; page k does not depend on the count", ge=0, le=MAX_SEED, example=7, group=COMMON
    )
    size: int = setting(256, "side of a picture, in pixels", ge=32, le=1024, group=COMMON)
    split: Split = setting("train", "pages and phrasings for training, or a held-out split", group=COMMON)
    pairs: Path | None = setting(
        None,
        "save edit pairs as parquet, in the columns of the published data set",
        group=COMMON,
        metavar="FILE",
    )
    captions: Path | None = setting(None, "save the captions, one per line", group=COMMON, metavar="FILE")
    varied: bool = setting(False, "write captions in varied forms, as for training", hidden=True)
    triples: Path | None = setting(
        None,
        "save exact text edits as parquet: caption, instruction, edited_caption",
        group=COMMON,
        metavar="FILE",
    )
    sheet: Path | None = setting(
        None, "save a contact sheet of the first 64 pages", group=COMMON, metavar="FILE"
    )


class BuildConfig(RunSettings, DeviceSettings):
    """Train the storybook model: ip2p storybook build --preset smoke -o model"""

    preset: Literal["smoke", "cpu", "h100"] = setting(
        "smoke", "smoke takes seconds; cpu takes hours; h100 needs a GPU", group=COMMON
    )
    out: Path = setting(
        Path("storybook-model"),
        "output folder; run the same command again to resume",
        group=COMMON,
        flags=("-o",),
    )
    bundle: Path | None = setting(
        None, "output folder of the half-precision model; default: OUT/bundle", hidden=True
    )
    start: str | None = setting(
        None,
        "train the UNet or decoder of this model further; made by this verb",
        group=COMMON,
        metavar="MODEL",
    )
    stage: Literal["all", "encoder", "decoder", "text", "clip", "perception", "unet", "decay", "lm"] = (
        setting("all", "train only this stage", group=COMMON)
    )
    seconds: float | None = setting(
        None, "save and stop after this many seconds", ge=0, le=1e9, example=540.0, group=COMMON
    )
    minutes: float | None = setting(
        None,
        "training time of the stage in total; extends a finished decoder, perception or unet",
        ge=0,
        le=1e6,
        example=120.0,
        group=COMMON,
    )
    steps: int | None = setting(
        None,
        "optimizer steps per stage, instead of the preset's",
        ge=1,
        le=10**9,
        example=100,
        group=COMMON,
    )


class ScoreConfig(RunSettings, OverwriteSettings, DTypeSettings, DeviceSettings, ScaleSettings, StepSettings):
    """Score a model on storybook edits with exact answers: ip2p storybook score --count 500"""

    model: str = setting("storybook", "model name, or a diffusers folder", group=COMMON)
    split: Texts = setting(
        (),
        "test, unseen_phrasings, …; may be repeated; default: all but train",
        group=COMMON,
        metavar="SPLIT",
    )
    count: int = setting(500, "number of edits per split", ge=1, le=1_000_000, group=COMMON)
    seed: Seed = setting(0, "seed of the edits and the noise", ge=0, le=MAX_SEED, example=7, group=COMMON)
    out: Path | None = setting(None, "save all numbers as JSON", group=COMMON, flags=("-o",))
    sheet: Path | None = setting(
        None,
        "save a picture with pages, instructions, results and exact answers",
        group=COMMON,
        metavar="FILE",
    )
    schedule: ScheduleName | None = setting(
        None, "noise schedule", fallback="linspace", group=COMMON, aliases=("spacing",)
    )
    cfg_interval: SharePair | None = setting(
        None,
        "apply guidance only between these noise levels",
        fallback=(0.0, 1.0),
        example=(0.2, 0.9),
        group=COMMON,
        metavar="LOW HIGH",
        hidden=True,
    )
    size: int | None = setting(
        None,
        "side of a picture; default: the model's training size",
        ge=32,
        le=1024,
        example=256,
        group=COMMON,
        metavar="SIDE",
    )
    batch_size: int = setting(16, "edits per batch", ge=1, le=4096, group=COMMON)


T = TypeVar("T")
ON_SHEET, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 160


def run_draw(config: DrawConfig) -> None:
    """Write the requested outputs and print their paths."""
    from ip2p.training.storybook.pairs import write_exact_triples, write_pairs  # imports pyarrow
    from ip2p_storybook.triples import exact_triples

    files = [
        path for path in (config.pairs, config.captions, config.triples, config.sheet) if path is not None
    ]
    if config.out is None and not files:
        raise InputError("no output is given; add -o FOLDER, --pairs, --captions, --triples or --sheet.")
    for path in files:
        check_output(path, overwrite=config.overwrite)
    if config.out is not None:
        make_folder(config.out)
        if not config.overwrite and any(config.out.glob("*.png")):
            raise InputError(
                f"{config.out} already contains pictures; add --overwrite, or choose another folder."
            )

    if config.out is not None or config.sheet is not None:
        _pictures(config)
    if config.captions is not None:
        write_text(config.captions, "".join(f"{text}\n" for text in _captions(config)))
    if config.triples is not None:
        with progress("triples", config.count, "triples") as advance:
            triples = exact_triples(config.count, config.seed, config.split)
            write_exact_triples(_each(triples, advance), config.triples)
    if config.pairs is not None:
        with progress("pairs", config.count, "pairs") as advance:
            write_pairs(_each(edits(config), advance), config.pairs, size=config.size)
    for output in (config.out, *files):
        if output is not None:
            print(output)


def edits(config: DrawConfig) -> Iterator[Edit]:
    """The edits of the config's seed. Their pages before the edit are the pages to draw."""
    from ip2p_storybook.edits import sample_edit
    from ip2p_storybook.scene import rng_for

    for number in range(config.count):
        yield sample_edit(rng_for("storybook draw", config.seed, number), split=config.split)


def _captions(config: DrawConfig) -> Iterator[str]:
    from ip2p_storybook.captions import caption
    from ip2p_storybook.scene import rng_for

    for number, edit in enumerate(edits(config)):
        yield caption(edit.before, rng_for("captions", config.seed, number) if config.varied else None)


def _pictures(config: DrawConfig) -> None:
    from ip2p_storybook.draw import draw as draw_scene  # imports skia

    shown: list[Image.Image] = []
    count = config.count if config.out is not None else min(config.count, ON_SHEET)
    with progress("pages", count, "pages") as advance:
        for number, edit in zip(range(count), edits(config), strict=False):
            picture = Image.fromarray(draw_scene(edit.before, config.size))
            if config.out is not None:
                with replacing(config.out / f"{number:06}.png", sync=False) as temporary:
                    picture.save(temporary)
            if config.sheet is not None and len(shown) < ON_SHEET:
                shown.append(picture.resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS))
            advance()
    if config.out is not None:
        write_text(config.out / "run.json", run_json(config))
    if config.sheet is not None:
        rows = [shown[i : i + SHEET_COLUMNS] for i in range(0, len(shown), SHEET_COLUMNS)]
        with replacing(config.sheet) as temporary:
            contact_sheet(rows).save(temporary)


def _each(items: Iterator[T], advance: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        advance()


def run_build(config: BuildConfig) -> None:
    """Train the model into `config.out`, or resume. Writes the settings to `run.json`."""
    make_folder(config.out)
    write_text(config.out / "run.json", run_json(config))
    bundle = config.bundle or config.out / "bundle"

    from ip2p.models.load import quiet  # imports torch
    from ip2p.training.storybook.build import build_model

    with quiet():
        build_model(
            config.preset,
            config.out,
            seconds=config.seconds,
            stage=config.stage,
            device=config.device,
            steps=config.steps,
            minutes=config.minutes,
            start=config.start,
            bundle=bundle,
        )
    print(bundle)


def run_score(config: ScoreConfig) -> None:
    """Score a model on edits with exact answers: print the tables and write the requested files."""
    from ip2p_storybook.edits import SPLITS

    for split in config.split:
        if split not in SPLITS:
            raise InputError(f"--split is {split!r}; choose one of: {', '.join(SPLITS)}.")
    for path in (config.out, config.sheet):
        if path is not None:
            check_output(path, overwrite=config.overwrite)

    from ip2p.editing.editor import Editor  # these import torch
    from ip2p.evaluation import storybook

    splits = tuple(dict.fromkeys(config.split)) or storybook.SPLITS
    editor = Editor.load(config.model, device=config.device, dtype=config.dtype)
    rows: list[tuple[storybook.Case, NDArray[np.uint8]]] = []
    with progress("scoring", config.count * len(splits), "edits") as advance:
        result = storybook.score(
            editor,
            count=config.count,
            seed=config.seed,
            settings=EditSettings(**{name: getattr(config, name) for name in storybook.SAMPLING}),
            size=config.size,
            batch_size=config.batch_size,
            splits=splits,
            advance=advance,
            rows=rows,
            keep_rows=storybook.ROWS_SHOWN if config.sheet else 0,
        )
    print(storybook.as_text(result))
    if config.out:
        write_text(config.out, json.dumps({"model": config.model, **result}, indent=1) + "\n")
    if config.sheet:
        with replacing(config.sheet) as temporary:
            storybook.rows_picture(rows).save(temporary)
