"""How right a pair is that was drawn from two captions: judged against the edit that its words came from.

A caption settles what a page shows, not its details: which way a thing looks, where the horizon lies, each
shade. All of them follow from the page's seed, so every answer is drawn with several seeds, and a picture is
as far from an answer as from the nearest of its drawings. As in `storybook.score` a picture is right when
the right answer is nearer (mean squared error, where any drawing of any answer differs from the page) than
every other one: the page before the edit, the exact answer, and 15 other answers of the same kind.

Pictures are compared as means over squares, 32 across the page, so that neither the autoencoder's blur nor a
pixel's shift decides. Of pages with details that no drawing has, put through the autoencoder, 79% of the
pairs are right and 96% changed (70 edits, 32 drawings); pixel by pixel 69% and 76%, with one drawing about
half of that. With another answer in place of the exact one, the other edits' pairs, or one page twice, none
is right. What is not done: to take the mean colour out forgives a picture that is too dark as a whole, and
costs as much elsewhere, since the mean is what tells a night.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ip2p.evaluation.storybook import OTHER_ANSWERS, visible
from ip2p_storybook.captions import form_of
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import (
    EDIT_KINDS,
    Edit,
    alternatives,
    change_mask,
    is_unique,
    sample_edit,
)
from ip2p_storybook.metrics import page_psnr
from ip2p_storybook.scene import Scene, rng_for, stable_hash
from ip2p_storybook.triples import ExactTriple, mentions_all, triple_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

DETAILS = 32
CELLS = 32  # squares across a page
# Prompt-to-Prompt keeps things where they are.
PAIR_KINDS = tuple(kind for kind in EDIT_KINDS if kind != "move")
_PAGE, _EXACT = 0, 1  # of the answers; the others follow


@dataclass(frozen=True, kw_only=True)
class PairCase:
    """An edit in words, and every answer to it in every drawing.

    drawings: uint8 [details, answers, 32, 32, 3], means over squares; the first answer is the page, the
    second the exact one, the others follow; the first details are the page's own. region: bool [32, 32],
    where any drawing of an answer differs from the page with the same details. fixed: bool [size, size],
    what must stay.
    """

    triple: ExactTriple
    drawings: NDArray[np.uint8]
    region: NDArray[np.bool_]
    fixed: NDArray[np.bool_]

    @cached_property
    def _seen(self) -> NDArray[np.float32]:
        """The drawings in the region, [details, answers, values]."""
        values: NDArray[np.float32] = self.drawings[:, :, self.region].astype(np.float32)
        return values.reshape(*values.shape[:2], -1)

    @cached_property
    def _alike(self) -> NDArray[np.bool_]:
        """Drawings of others that look like the exact one with the same details: [details, answers]."""
        alike: NDArray[np.bool_] = (self.drawings == self.drawings[:, [_EXACT]]).all(axis=(2, 3, 4))
        alike[:, _EXACT] = False
        return alike


@dataclass(frozen=True, kw_only=True)
class PairVerdict:
    """What holds of a pair.

    drawn: the picture before is nearest to the page. edited: the picture after is nearest to the exact
    answer. changed: the difference of both is nearest to what the edit changes, and not to none or to another
    change, whatever both draw otherwise than any page. kept: PSNR in dB between both outside what the edit
    may change; None where that is the whole page.
    """

    drawn: bool
    edited: bool
    changed: bool
    kept: float | None

    @property
    def right(self) -> bool:
        """The score's rule for both pictures."""
        return self.drawn and self.edited


def make_pair_case(triple: ExactTriple, size: int, details: int = DETAILS) -> PairCase:
    """Draw every answer to an edit with `details` seeds, the page's own first."""
    edit = triple.edit
    _, scenes = _answers(edit, size)
    drawings = np.empty((details, len(scenes), CELLS, CELLS, 3), np.uint8)
    may_change = np.zeros((size, size), bool)
    for k, seed in enumerate(detail_seeds(edit, details)):
        drawings[k] = [means(draw(replace(scene, seed=seed), size)) for scene in scenes]
        may_change |= change_mask(with_details(edit, seed), size)
    return PairCase(
        triple=triple,
        drawings=drawings,
        region=(drawings != drawings[:, [_PAGE]]).any(axis=(0, 1, 4)),
        fixed=~may_change,
    )


def means(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture, uint8 [size, size, 3], as means over squares, [32, 32, 3]."""
    return np.asarray(Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX))


def _answers(edit: Edit, size: int) -> tuple[list[NDArray[np.uint8]], list[Scene]]:
    """The page, the exact answer and up to 15 others, in pictures and records."""
    scenes = [edit.before, edit.after]
    pictures = [draw(scene, size) for scene in scenes]
    for scene in alternatives(edit):
        picture = draw(scene, size)
        # Two records may look alike, as in `score.make_case`.
        if not any(np.array_equal(picture, seen) for seen in pictures):
            pictures.append(picture)
            scenes.append(scene)
        if len(scenes) == OTHER_ANSWERS + 2:
            break
    return pictures, scenes


def detail_seeds(edit: Edit, number: int) -> list[int]:
    """Seeds of pages that the caption tells as well: the page's own, then ones that follow from it."""
    own = edit.before.seed
    return [own, *(stable_hash("details", own, k) & 0xFFFFFFFF for k in range(1, number))]


def with_details(edit: Edit, seed: int) -> Edit:
    """The same edit of a page that differs in what no caption tells."""
    before, after = replace(edit.before, seed=seed), replace(edit.after, seed=seed)
    return replace(edit, before=before, after=after, steps=())


def judge_pair(case: PairCase, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> PairVerdict:
    """Compare the pictures of a pair, uint8 [size, size, 3] each, with all answers."""
    one, two = (means(picture)[case.region].astype(np.float32).ravel() for picture in (before, after))
    seen = case._seen
    kept = page_psnr(after[case.fixed], before[case.fixed]) if case.fixed.mean() > 0.01 else None
    return PairVerdict(
        drawn=_nearest(one, seen, _PAGE, case._alike),
        edited=_nearest(two, seen, _EXACT, case._alike),
        changed=_nearest(two - one, seen - seen[:, [_PAGE]], _EXACT, case._alike),
        kept=kept,
    )


def _nearest(
    values: NDArray[np.float32], drawings: NDArray[np.float32], right: int, alike: NDArray[np.bool_]
) -> bool:
    """Whether an answer's nearest drawing is nearer than that of every other one."""
    errors = np.square(drawings).sum(axis=-1) - 2 * (drawings @ values)
    nearest: NDArray[Any] = np.where(alike, np.inf, errors).min(axis=0)
    return bool((nearest[right] < np.delete(nearest, right)).all())


# --- edits to draw --------------------------------------------------------------------------------


def pair_triples(seed: int, size: int, split: str = "test") -> Iterator[ExactTriple]:
    """Edits in words without end, the kinds in turn, that can be judged.

    Their answer is unique, its change can be seen, and there are enough other answers. The captions, in one
    form, tell sizes and sides: of a page whose caption leaves one out, many pictures are right.
    """
    for number in count():
        rng = rng_for("pair score", split, seed, number)
        while True:
            edit = sample_edit(rng, kind=PAIR_KINDS[number % len(PAIR_KINDS)], split=split)
            form = form_of(rng)
            if not (form.sizes and form.sides and mentions_all(edit, form) and is_unique(edit)):
                continue
            pictures, _ = _answers(edit, size)
            if len(pictures) == OTHER_ANSWERS + 2 and visible(pictures[_PAGE], pictures[_EXACT]):
                yield triple_of(edit, form)
                break
