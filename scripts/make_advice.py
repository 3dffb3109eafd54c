"""Write docs/advice.md. With --pictures, also draw its images with the bundled model.

With --check, fail if the page is not up to date. Draw the images again when the bundled model changes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ip2p.editing import advice
from ip2p.editing.chain import edit_chain
from ip2p.editing.grid import Axis, default_values, draw_grid, draw_sheet
from ip2p.pictures.images import load_image, save_image
from ip2p.settings import EditSettings

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = ROOT / "docs" / "advice.md", ROOT / "docs" / "pictures"
SIDE = 160
STEPS, SEED = 20, 1


def draw(model: str, steps: int, folder: Path, pages: Path) -> None:
    """Draw the four images of `advice.PICTURES` with `model` into `folder`."""
    from ip2p.editing.editor import Editor  # imports torch

    editor = Editor.load(model, dtype="fp32")
    defaults = editor.resolved()
    text_cfg, image_cfg = defaults.text_cfg, defaults.image_cfg
    entries = json.loads((pages / "pages.json").read_text(encoding="utf-8"))
    first, second = (load_image(pages / entries[k]["page"]) for k in (0, 1))
    thing = entries[0]["instructions"][0]

    def edited(picture: Image.Image, instruction: str, seed: int = SEED, **settings: object) -> Image.Image:
        return editor.edit(picture, instruction, steps=steps, seeds=[seed], **settings)[0]

    scales = {"text_cfg": text_cfg, "image_cfg": image_cfg}
    settings = EditSettings(**scales, seed=SEED)
    axes = [Axis(setting=name, values=default_values(name, settings)) for name in ("text_cfg", "image_cfg")]
    grid = draw_grid(
        editor, first, "make it night", columns=axes[0], rows=axes[1], cell=SIDE, steps=steps, seed=SEED
    )
    save_image(grid, folder / "grid.png")

    strengths = {
        "too little": {"text_cfg": text_cfg / 2, "image_cfg": image_cfg * 1.5},
        "as asked": scales,
        "too much": {"text_cfg": text_cfg * 3, "image_cfg": image_cfg},
    }
    titles = [
        f"{name}: text {pair['text_cfg']:g}, image {pair['image_cfg']:g}" for name, pair in strengths.items()
    ]
    results = [small(edited(second, "make it snow", **pair)) for pair in strengths.values()]
    save_image(
        draw_sheet([results], columns=titles, rows=[""], title="“make it snow”", picture=small(second)),
        folder / "scales.png",
    )

    plain, masked = edited(first, thing), edited(first, thing, auto_mask=0.5)
    region = small(masked.info["mask"])
    save_image(
        draw_sheet(
            [[small(plain), region, small(masked)]],
            columns=["without a mask", "detected region", "--auto-mask"],
            rows=[""],
            title=f"“{thing}”",
            picture=small(first),
        ),
        folder / "mask.png",
    )

    save_image(chain_sheet(editor, second, steps), folder / "chain.png")


def chain_sheet(editor: Editor, picture: Image.Image, steps: int) -> Image.Image:
    """A chain of three edits, first from the previous result and then from the original."""
    instructions = ["make it night", "make it snow", "make it look like a watercolour"]
    rows = [
        [
            small(step.image)
            for step in edit_chain(
                editor, picture, instructions, seed=SEED, from_original=from_original, steps=steps
            )
        ]
        for from_original in (False, True)
    ]
    return draw_sheet(
        rows, columns=instructions, rows=["from the previous", "--from-original"], picture=small(picture)
    )


def small(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    text = advice.page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not up to date; run: python scripts/make_advice.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
    if "--pictures" in sys.argv[1:]:
        draw("storybook", STEPS, PICTURES, ROOT / "examples")
