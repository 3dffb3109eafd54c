"""Edit the example pages with the model that ships in the package: `make demo`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

import ip2p
from ip2p.pictures.images import contact_sheet, save_image

EXAMPLES = Path(__file__).resolve().parent
RESULTS = EXAMPLES.parent / "demo"


def main() -> None:
    print(
        "The bundled model edits drawn storybook pages. To edit a photo: "
        'ip2p edit photo.jpg "make it snow" --model timbrooks/instruct-pix2pix\n'
    )
    RESULTS.mkdir(exist_ok=True)
    editor = ip2p.Editor.load("storybook")
    rows: list[list[Image.Image]] = []
    labels = []
    for entry in json.loads((EXAMPLES / "pages.json").read_text(encoding="utf-8")):
        page = EXAMPLES / entry["page"]
        row: list[Image.Image] = [Image.open(page)]
        for instruction in entry["instructions"]:
            [result] = editor.edit(page, instruction, seeds=[1])
            words = re.sub(r"[^a-z0-9]+", "-", instruction.lower()).strip("-")
            print(save_image(result, RESULTS / f"{page.stem}-{words}.png"))
            row.append(result)
        rows.append(row)
        labels.append("   |   ".join(("page", *entry["instructions"])))
    sheet = save_image(contact_sheet(rows, labels), RESULTS / "contact-sheet.png")
    print(f"\nThe results are saved in {RESULTS}; all in one picture: {sheet}")


if __name__ == "__main__":
    main()
