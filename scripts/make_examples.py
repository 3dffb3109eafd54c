"""Choose example pages that the bundled model edits correctly, and draw them.

python scripts/make_examples.py            # takes minutes; run it when the bundled model changes

The pages are held out of training. Of `--pages` candidates, those with the most correct edits (strict score
of `ip2p storybook score`) are kept, in the model's folder and, smaller, in examples/. They are selected, so
every place that shows them says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import ip2p
from ip2p.evaluation.storybook import judge, make_case, visible
from ip2p.models.bundle import EXAMPLES, PACKAGED
from ip2p.pictures.images import save_image
from ip2p_storybook.captions import caption
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import EDIT_KINDS, GLOBAL_KINDS, Edit, is_unique, propose, sample_edit
from ip2p_storybook.scene import Scene, rng_for

ROOT = Path(__file__).resolve().parent.parent
SHOWN, EACH, LOCAL = 6, 4, 2  # pages, instructions of each, and how many of them edit a thing
SIDE = 512  # of a page in the model's folder
SMALL, SMALL_SIDE = 3, 256  # number of pages in examples/, and their side
CLEAR = ("recolour", "remove", "take_off", "time", "weather", "place")  # kinds whose results look right too


def page_edits(number: int) -> Iterator[Edit]:
    """One edit of each kind that is possible on a page of the test split, with one right answer."""
    page = sample_edit(rng_for("example page", number), split="test").before
    for kind in EDIT_KINDS:
        edit = propose(page, rng_for("example edit", number, kind), kind, "test")
        if edit is not None and is_unique(edit):
            yield edit


def right_edits(editor: ip2p.Editor, number: int, size: int) -> list[Edit]:
    """The edits of a page that the model makes right, those of things first."""
    found = []
    for edit in page_edits(number):
        case = make_case(edit, size)
        if not visible(case.page, case.exact):
            continue
        [result] = editor.edit(Image.fromarray(case.page), edit.instruction, seeds=[1])
        if judge(case, np.asarray(result.convert("RGB"))).strict:
            found.append(edit)
    return sorted(found, key=lambda edit: edit.kind in GLOBAL_KINDS)


def chosen_instructions(edits: list[Edit]) -> list[str]:
    """Some instructions of the right edits: of things and of the whole page, the clearest first."""
    short = sorted(edits, key=lambda edit: (edit.kind not in CLEAR, len(edit.instruction)))
    things = [edit.instruction for edit in short if edit.kind not in GLOBAL_KINDS]
    whole = [edit.instruction for edit in short if edit.kind in GLOBAL_KINDS]
    return [*things[: max(LOCAL, EACH - len(whole))], *whole[: EACH - LOCAL]][:EACH]


def is_fair_day(page: Scene) -> bool:
    """Whether "make it night" and "make it snow" change the page."""
    return page.time in ("morning", "noon") and page.weather in ("clear", "cloudy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pages", type=int, default=60, help="number of candidates")
    editor = ip2p.Editor.load("storybook")
    size = editor.bundle.card.native_size
    rated: list[tuple[int, list[Edit]]] = []
    for number in range(parser.parse_args().pages):
        edits = right_edits(editor, number, size)
        things = sum(edit.kind not in GLOBAL_KINDS for edit in edits)
        print(f"page {number}: {len(edits)} right, {things} of things", flush=True)
        if things >= LOCAL and len(edits) >= EACH and is_fair_day(edits[0].before):
            rated.append((number, edits))
    rated.sort(key=lambda entry: -len(entry[1]))
    folder = PACKAGED / "storybook" / EXAMPLES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries, small = [], []
    for place, (number, edits) in enumerate(rated[:SHOWN], 1):
        page, instructions = edits[0].before, chosen_instructions(edits)
        title = caption(page, rng_for("example title", number))
        file = folder / f"page-{place}.png"
        save_image(Image.fromarray(draw(page, SIDE)), file)
        entries.append({"page": file.name, "title": title, "instructions": instructions})
        if place <= SMALL:
            save_image(Image.fromarray(draw(page, SMALL_SIDE)), ROOT / "examples" / file.name, overwrite=True)
            small.append({"page": file.name, "instructions": instructions[:3]})
    for path, rows in ((folder / "pages.json", entries), (ROOT / "examples" / "pages.json", small)):
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
