"""Draw the pages in examples/, each with instructions that make sense on it (examples/pages.json).

The pages are held out of training and chosen by their seed: one for each kind of edit below, plus two
instructions that fit every page. `examples/demo.py` edits them.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from ip2p_storybook.draw import draw
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.scene import rng_for

FOLDER = Path(__file__).resolve().parent.parent / "examples"
KINDS = ("recolour", "place", "put_on")
FOR_EVERY_PAGE = ("make it snow", "make it night")


def main() -> None:
    entries = []
    for kind in KINDS:
        edit = sample_edit(rng_for("examples", kind), kind=kind, split="test")
        name = f"page-{len(entries) + 1}.png"
        Image.fromarray(draw(edit.before, 256)).save(FOLDER / name, optimize=True)
        entries.append({"page": name, "instructions": [edit.instruction, *FOR_EVERY_PAGE]})
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (FOLDER / "pages.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
