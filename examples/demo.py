"""Edit the example pages with the model that ships in the package: `make demo`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

import ip2p
from ip2p.pictures.images import grid, save_image

EXAMPLES = Path(__file__).resolve().parent
RESULTS = EXAMPLES.parent / "demo"


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    editor = ip2p.Editor.load("storybook")
    rows, labels = [], []
    for entry in json.loads((EXAMPLES / "pages.json").read_text(encoding="utf-8")):
        page = EXAMPLES / entry["page"]
        row = [Image.open(page)]
        for instruction in entry["instructions"]:
            [result] = editor.edit(page, instruction, seeds=[1])
            words = re.sub(r"[^a-z0-9]+", "-", instruction.lower()).strip("-")
            print(save_image(result, RESULTS / f"{page.stem}-{words}.png"))
            row.append(result)
        rows.append(row)
        labels.append("   |   ".join(("page", *entry["instructions"])))
    sheet = save_image(grid(rows, labels), RESULTS / "contact-sheet.png")
    print(f"\nThe results are saved in {RESULTS}; all in one picture: {sheet}")


if __name__ == "__main__":
    main()
