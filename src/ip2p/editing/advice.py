"""How to word instructions and choose scales: printed by `ip2p edit --examples`, and the page docs/advice.md.

The text is Markdown that is also readable in a terminal: commands and templates are indented.
"""

from __future__ import annotations

TEXT = """\
# How to get good edits

## Instructions that work

Describe the change, not the whole picture. One change at a time works best.

    turn the … into a …          turn the dog into a fox
    make the … …                 make the house red
    make it …                    make it night; make it snow; make it look like a watercolor
    put … on …                   put a hat on the queen
    add …, remove …              add a balloon in the sky; remove the tree
    replace … with …             replace the car with a bus
    put them in …                put them in the desert
    what if …                    what if it were autumn?
    change the background to …   change the background to a beach

If an instruction fails, reword it: "turn him into a robot", "make him a robot" and "as a robot" give
different results. If a thing appears more than once, say which one you mean ("the cat on the left").

## The strength of the edit

Two scales control the strength. Start by comparing them side by side:

    ip2p grid page.png "make it night" -o grid.png

`--text-cfg` sets how strongly to follow the instruction, `--image-cfg` how strongly to keep the picture. The
defaults come from the model: 7.5 and 1.5 for the published models, where 5 to 10 and 1 to 2 are useful; the
storybook model has smaller ones.

### The edit changes too little

Lower `--image-cfg` in steps of 0.1 to 0.2, or raise `--text-cfg` by a third. If that is not enough, try
another seed or reword the instruction:

    ip2p edit page.png "make it night" --image-cfg 1.2
    ip2p edit page.png "make it night" --text-cfg 10
    ip2p edit page.png "make it night" --count 8 --best 2

### The edit changes too much

Raise `--image-cfg` or lower `--text-cfg`. If high scales make colors and contrast too strong, use
`--text-cfg-rescale`, or apply guidance only in the middle of the sampling:

    ip2p edit page.png "make it night" --image-cfg 1.8
    ip2p edit page.png "make it night" --text-cfg 5
    ip2p edit page.png "make it night" --text-cfg-rescale 0.7
    ip2p edit page.png "make it night" --cfg-interval 0.2 0.9

### The edit changes other things too

"Make the house red" may turn the sky red, too. Scales do not fix that, but a mask does. Let the model find
the region, check it, and adjust the threshold (a lower one selects more), or paint the mask yourself, white
where the picture may change:

    ip2p edit page.png "make the house red" --auto-mask --show-mask region.png
    ip2p edit page.png "make the house red" --auto-mask 0.35
    ip2p edit page.png "make the house red" --mask house.png

Outside the mask, every pixel stays identical (in PNG, to the byte).

## Chained edits

    ip2p edit page.png "make it night" --then "make it snow" --animation chain.gif

Each step starts from the previous result, so losses add up; a report at the end shows how far each step is
from the original. With `--from-original`, each step starts from the original with all instructions so far
combined: less detail is lost, but some instructions may be ignored.

## More advice

- More steps (`--steps 50`) improve fine details, but rarely fix an edit that fails completely.
- Small faces often look bad, because the autoencoder loses their details. Mask them, so that the model sees
  them enlarged, or crop the picture first.
- The same command with the same seed gives the same picture, and every result stores its settings:
  `ip2p edit page.png --from-settings night.png` repeats the edit, and any other flag overrides one setting.
"""

# The picture in docs/pictures/ at the end of a section, and its caption.
PICTURES = {
    "## The strength of the edit": ("grid.png", "One instruction over both scales, drawn by ip2p grid"),
    "### The edit changes too much": ("scales.png", "A page; edited too little, as intended, and too much"),
    "### The edit changes other things too": (
        "mask.png",
        "A page; edited without a mask; the region; with it",
    ),
    "## Chained edits": ("chain.png", "A page, followed by the steps of a chain"),
}


def page() -> str:
    """The text with the pictures of `PICTURES`."""
    lines: list[str] = []
    heading = ""
    for line in [*TEXT.splitlines(), "## "]:
        if line.startswith("#"):
            if heading in PICTURES:
                name, caption = PICTURES[heading]
                lines += [f"![{caption}](pictures/{name})", ""]
            heading = line
        lines.append(line)
    return "\n".join(lines[:-1]) + "\n"


def templates() -> list[tuple[str, str]]:
    """The instruction templates, each with its first example: ("make it …", "make it night")."""
    pairs = []
    for line in TEXT.split("## The strength of the edit")[0].splitlines():
        if line.startswith("    ") and (words := line.strip()):
            template, _, examples = (part.strip() for part in words.partition("  "))
            pairs.append((template, examples.split(";")[0].split(",")[0]))
    return pairs
