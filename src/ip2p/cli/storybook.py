"""`ip2p storybook draw`: pages, edit pairs, captions, edits in words and a contact sheet, from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ip2p.base.errors import InputError
from ip2p.base.files import check_output, make_folder, replacing, write_text
from ip2p.base.terminal import progress
from ip2p.config import BuildConfig, DrawConfig, run_json
from ip2p.pictures.images import grid
from ip2p.training.storybook.pairs import write_pairs, write_triples
from ip2p_storybook.captions import caption
from ip2p_storybook.draw import draw as draw_scene
from ip2p_storybook.edits import Edit, sample_edit
from ip2p_storybook.scene import rng_for
from ip2p_storybook.triples import exact_triples

T = TypeVar("T")
ON_SHEET, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 160


def draw(config: DrawConfig) -> None:
    """Write what the config asks for; the paths of the outputs go to stdout."""
    asked = (config.pairs, config.captions, config.triples, config.sheet)
    files = [path for path in asked if path is not None]
    if config.out is None and not files:
        raise InputError(
            "nothing is asked for; name a folder (-o pages), --pairs, --captions, --triples or --sheet."
        )
    for path in files:
        check_output(path, overwrite=config.overwrite)
    if config.out is not None:
        make_folder(config.out)
        if not config.overwrite and any(config.out.glob("*.png")):
            raise InputError(
                f"{config.out} holds pictures already; add --overwrite, or choose another folder."
            )

    if config.out is not None or config.sheet is not None:
        _pictures(config)
    if config.captions is not None:
        write_text(config.captions, "".join(f"{text}\n" for text in _captions(config)))
    if config.triples is not None:
        with progress("triples", config.count) as advance:
            triples = exact_triples(config.count, config.seed, config.split)
            write_triples(_each(triples, advance), config.triples)
    if config.pairs is not None:
        with progress("pairs", config.count) as advance:
            write_pairs(_each(edits(config), advance), config.pairs, size=config.size)
    for output in (config.out, *files):
        if output is not None:
            print(output)


def edits(config: DrawConfig) -> Iterator[Edit]:
    """The edits of the config's seed; their pages are the pages that are drawn."""
    for number in range(config.count):
        yield sample_edit(rng_for("storybook draw", config.seed, number), split=config.split)


def _captions(config: DrawConfig) -> Iterator[str]:
    for number, edit in enumerate(edits(config)):
        yield caption(edit.before, rng_for("captions", config.seed, number) if config.varied else None)


def _pictures(config: DrawConfig) -> None:
    shown: list[Image.Image] = []
    count = config.count if config.out is not None else min(config.count, ON_SHEET)
    with progress("pages", count) as advance:
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
        save_sheet(grid(rows), config.sheet)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        sheet.save(temporary)


def _each(items: Iterator[T], advance: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        advance()


def build(config: BuildConfig) -> None:
    """Train into `config.out`, or go on there; `run.json` beside the model says with what."""
    make_folder(config.out)
    write_text(config.out / "run.json", run_json(config))
    bundle = config.bundle or config.out / "bundle"

    from ip2p.training.storybook.build import run  # imports torch

    run(
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
