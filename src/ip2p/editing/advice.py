"""How to word instructions and choose scales: printed by `ip2p edit --examples`, and the page docs/advice.md.

The text is Markdown that reads well in a terminal too: commands and templates are indented.
"""

from __future__ import annotations

TEXT = """\
# What to ask, and how much

## Instructions that work

An instruction says what to change, not what the whole picture shows. One change at a time works best.

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
different results. If there are several things of a kind, name the one you mean ("the cat on the left").

## How much

Two scales control the strength. Compare them side by side first:

    ip2p grid page.png "make it night" -o grid.png

`--text-cfg` is how strongly the instruction is followed, `--image-cfg` how strongly the picture is kept. The
defaults are the model's own: 7.5 and 1.5 for the published models, where 5 to 10 and 1 to 2 are useful; the
storybook model has smaller ones.

### It changes too little

Lower `--image-cfg` in steps of 0.1 to 0.2, or raise `--text-cfg` by a third. Then try another seed or other
words:

    ip2p edit page.png "make it night" --image-cfg 1.2
    ip2p edit page.png "make it night" --text-cfg 10
    ip2p edit page.png "make it night" --count 8 --best 2

### It changes too much

Raise `--image-cfg` or lower `--text-cfg`. If high scales make the colors and the contrast too hard, reduce
them with `--text-cfg-rescale`, or use guidance only in the middle of the sampling:

    ip2p edit page.png "make it night" --image-cfg 1.8
    ip2p edit page.png "make it night" --text-cfg 5
    ip2p edit page.png "make it night" --text-cfg-rescale 0.7
    ip2p edit page.png "make it night" --cfg-interval 0.2 0.9

### It changes what was not named

"Make the house red" may turn the sky red, too. No scale fixes that; a mask does. Let the model find the
region, look at it, and move the threshold (a lower one selects more), or draw the mask yourself, white where
the edit may change the picture:

    ip2p edit page.png "make the house red" --auto-mask --show-mask region.png
    ip2p edit page.png "make the house red" --auto-mask 0.35
    ip2p edit page.png "make the house red" --mask house.png

Outside the mask, every pixel stays the same (in PNG, to the byte).

## Edits in a row

    ip2p edit page.png "make it night" --then "make it snow" --animation chain.gif

Each step starts from the result of the one before, so losses add up; the report at the end shows how far each
step is from the start. With `--from-original`, each step starts from the original with the instructions
joined: less is lost, but some of many instructions may be ignored.

## More advice

- More steps (`--steps 50`) help with fine details, but seldom with an edit that fails altogether.
- Small faces come out badly, because the autoencoder keeps few of their details. Mask them, so that the model
  sees them enlarged, or crop the picture first.
- The same command with the same seed gives the same picture, and every result carries its settings:
  `ip2p edit page.png --from-settings night.png` makes it again, and any other flag changes that one setting.
"""

# Which picture of docs/pictures/ the page shows at the end of a section, and what it says of it.
PICTURES = {
    "## How much": ("grid.png", "One instruction over both scales, as ip2p grid draws it"),
    "### It changes too much": ("scales.png", "A page; edited too little, as asked, and too much"),
    "### It changes what was not named": ("mask.png", "A page; edited without a mask; the region; with it"),
    "## Edits in a row": ("chain.png", "A page, and the steps of a chain after it"),
}


def page() -> str:
    """The text with a picture at the end of the sections that have one."""
    lines: list[str] = []
    heading = ""
    for line in [*TEXT.splitlines(), "## "]:
        if line.startswith("#"):
            if heading in PICTURES:
                name, words = PICTURES[heading]
                lines += [f"![{words}](pictures/{name})", ""]
            heading = line
        lines.append(line)
    return "\n".join(lines[:-1]) + "\n"
