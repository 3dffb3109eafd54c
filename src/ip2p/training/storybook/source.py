"""The storybook as training data that is drawn on the fly and never repeats."""

from __future__ import annotations

from ip2p.data.records import Pair
from ip2p.settings import Split
from ip2p_storybook.captions import caption
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.labels import edit_labels, scene_labels
from ip2p_storybook.scene import rng_for

ENDLESS = 2**31


class StorybookSource:
    """Pairs of square pages of `size` pixels; row k of a seed is the same on every machine.

    count: the number of rows; None is endless. split: "train" excludes what the score holds out
    (`edits.sample_edit`).
    """

    def __init__(self, size: int, *, seed: int = 0, split: Split = "train", count: int | None = None) -> None:
        self.size, self.seed, self.split = size, seed, split
        self.endless = count is None
        self.count = ENDLESS if count is None else count
        self.name = "storybook"
        self.key = f"storybook-{split}-{size}-{seed}-{self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Pair:
        if not 0 <= row < self.count:
            raise IndexError(row)
        rng = rng_for("storybook pairs", self.seed, row)
        edit = sample_edit(rng, split=self.split)
        return Pair(
            id=f"{self.seed}-{row}",
            before=draw(edit.before, self.size),
            after=draw(edit.after, self.size),
            instruction=edit.instruction,
            caption=caption(edit.before, rng),
            edited_caption=caption(edit.after, rng),
            labels={
                "before": scene_labels(edit.before),
                "after": scene_labels(edit.after),
                "edit": edit_labels(edit),
            },
        )

    def blocks(self) -> list[range]:
        return [range(self.count)]
