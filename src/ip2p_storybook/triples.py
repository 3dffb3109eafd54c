"""Exact triples: a caption, an instruction, and the caption of the exact answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ip2p_storybook.captions import Form, form_of, say_page
from ip2p_storybook.edits import Edit, sample_edit
from ip2p_storybook.language import words_of
from ip2p_storybook.scene import rng_for, stable_hash

TRIPLE_COLUMNS = ("id", "caption", "instruction", "edited_caption", "source")
SOURCE = "storybook"
_CANONICAL_SHARE = 0.2  # the other captions are varied, as in the training of the editor
_SIDE_WORDS = frozenset(("left", "right", "middle", "centre", "center"))


@dataclass(frozen=True, kw_only=True)
class ExactTriple:
    """An edit, and the captions of both pages in the same form."""

    id: str
    edit: Edit
    form: Form
    caption: str
    edited_caption: str

    @property
    def instruction(self) -> str:
        return self.edit.instruction


def exact_triples(count: int, seed: int, split: str = "train", *, first: int = 0) -> Iterator[ExactTriple]:
    """Triples `first` to `first + count - 1` of a seed, with the phrasings and pages of the split.

    No triple moves a thing, because Prompt-to-Prompt keeps positions, and none has typos. A fifth of the
    captions are canonical, the others varied; none omits anything that the instruction mentions or changes.
    """
    for number in range(first, first + count):
        yield exact_triple(rng_for("exact triple", seed, split, number), split)


def exact_triple(rng: random.Random, split: str = "train") -> ExactTriple:
    """Sample one triple."""
    while True:
        # Training phrasings without typos, as in the split "test".
        phrasings = "test" if split == "train" else split
        edit = sample_edit(rng, split=phrasings, page_split="train" if split == "train" else None)
        form = Form() if rng.random() < _CANONICAL_SHARE else form_of(rng)
        if mentions_all(edit, form):
            return triple_of(edit, form)


def triple_of(edit: Edit, form: Form) -> ExactTriple:
    """The edit as a triple, with captions in this form."""
    caption, edited = say_page(edit.before, form), say_page(edit.after, form)
    id = f"{stable_hash('triple', caption, edit.instruction, edited):016x}"
    return ExactTriple(id=id, edit=edit, form=form, caption=caption, edited_caption=edited)


def mentions_all(edit: Edit, form: Form) -> bool:
    """Whether captions in this form mention everything in the instruction, and show each change.

    Always False for an edit that moves a thing.
    """
    steps = edit.steps or (edit,)
    if any(step.kind == "move" for step in steps):
        return False
    if not form.sides and not _SIDE_WORDS.isdisjoint(words_of(edit.instruction)):
        return False
    for step in steps:
        if say_page(step.before, form) == say_page(step.after, form):
            return False
        if step.kind == "add" and not form.sizes:
            assert step.target is not None
            if step.after.things[step.target].size != "medium":
                return False
    return True
