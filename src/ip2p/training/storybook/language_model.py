"""Stage `lm`: the small language model that writes edits of captions (`ip2p synth instruct`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip2p.synth.instruct import MIDDLE, PACKAGED_LM, load_lm, reject
from ip2p.synth.records import Triple
from ip2p.synth.tune import IGNORED, batch_of, new_lm, row_of, save_lm
from ip2p.training.storybook.data import Stream, read_ahead
from ip2p.training.storybook.stage import SUMMARY, Run, train_stage
from ip2p_storybook.captions import phrases
from ip2p_storybook.language import OTHER_NOUNS, plural, words_of
from ip2p_storybook.scene import KINDS, rng_for
from ip2p_storybook.triples import ExactTriple, exact_triples

LM_TOKENS = 600  # words of captions and instructions, and letters for all other words


class Triples(Stream):
    """Batches of tokenized exact triples, (tokens, labels) [batch, longest], in groups of GROUPED.

    The triples of a batch have similar lengths, so there is little padding. Triples that `ip2p synth
    instruct` would reject are excluded, such as "add a tree on the left", which it takes for a spatial edit.
    """

    GROUPED = 8

    def __init__(self, tokenizer: Any, batch: int, seed: int, start: int = 0) -> None:
        super().__init__(batch, 0, seed, start)
        self.tokenizer = tokenizer

    def make(self, group: int) -> list[tuple[Tensor, Tensor]]:
        count = self.batch * self.GROUPED
        # About a third is rejected, so three times as many are enough.
        drawn = exact_triples(3 * count, self.seed, first=3 * count * group)
        plain = (to_learn(triple) for triple in drawn if is_plain(triple))
        kept = (triple for triple in plain if reject(triple) is None)
        rows = sorted((row_of(triple, self.tokenizer) for triple in islice(kept, count)), key=len)
        # Padding is at the end, where no token attends to it.
        made = (
            batch_of(rows[first : first + self.batch], self.tokenizer.pad_token_id)
            for first in range(0, count, self.batch)
        )
        batches = [(tokens, labels) for tokens, _, labels in made]
        rng_for("triples", self.seed, group).shuffle(batches)
        return batches


_PRONOUNS = frozenset(("it", "its", "he", "him", "his", "she", "her", "they", "them", "their"))
_VAGUE_NAMES = frozenset(("thing", "things", *KINDS, *map(plural, KINDS), *OTHER_NOUNS.values()))


def is_plain(exact: ExactTriple) -> bool:
    """Whether the instruction uses the same names for things as the captions.

    "The cat", not "it" or "the animal": a small model cannot learn when those are unambiguous.
    """
    for step in exact.edit.steps or (exact.edit,):
        words = set(words_of(step.instruction))
        if words & _VAGUE_NAMES or (step.target is not None and step.kind != "count" and words & _PRONOUNS):
            return False
    return True


def to_learn(exact: ExactTriple) -> Triple:
    """A triple for the language model: its instruction has one capital letter and no final punctuation.

    Words LIKE THESE Or These are not tokens, so the model would have to learn to spell them. Unpredictable
    details also add noise to the loss.
    """
    text = exact.instruction.rstrip(".?")
    words = text.split()
    if text.isupper() or (len(words) > 1 and all(not word[0].islower() for word in words)):
        text = text.lower()
    return Triple(
        id=exact.id,
        caption=exact.caption,
        instruction=text[0].upper() + text[1:],
        edited_caption=exact.edited_caption,
    )


class LmTask(nn.Module):
    """The loss per token of the answers; tokens of edited captions have the weight `edited`.

    There are hundreds of possible instructions for a caption, and no model can predict which one is used. The
    edited caption follows from the instruction, so its tokens show whether the model is right.
    """

    def __init__(self, lm: Any, tokenizer: Any, edited: float) -> None:
        super().__init__()
        self.lm, self.edited = lm, edited
        self.middle = tokenizer.convert_tokens_to_ids(MIDDLE)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens, labels = (part.to(self.lm.device) for part in batch)
        hidden = self.lm.model(input_ids=tokens).last_hidden_state[:, :-1]
        after = (tokens == self.middle).cumsum(1)[:, :-1] > 0
        labels = labels[:, 1:]
        learned = labels != IGNORED
        logits = self.lm.lm_head(hidden[learned]).float()
        losses = F.cross_entropy(logits, labels[learned], reduction="none")
        after = after[learned]
        weights = torch.where(after, self.edited, 1.0)
        metrics = {"instruction": losses[~after].mean(), "edited": losses[after].mean()}
        return (losses * weights).sum() / weights.sum(), {k: float(v.detach()) for k, v in metrics.items()}


def train_lm(run: Run) -> None:
    """Write `lm`. Raises OutOfTime."""
    preset = run.preset
    seed = preset.seed + 4
    if not (run.output / "lm_start").exists():
        triples = (to_learn(triple) for triple in exact_triples(preset.lm_texts, seed + 1))
        new_lm(
            (text for one in triples for text in (one.caption, one.instruction)),
            run.output / "lm_start",
            vocabulary=LM_TOKENS,
            width=preset.lm_width,
            layers=preset.lm_layers,
            heads=preset.lm_heads,
            inner=preset.lm_inner,
            phrases=phrases(),
            seed=preset.seed,
        )
    lm, tokenizer = load_lm(run.output / "lm_start")

    def batches(first: int) -> Iterator[list[Any]]:
        group, done = divmod(first, Triples.GROUPED)
        groups = read_ahead(Triples(tokenizer, preset.lm.batch, seed, group), preset.workers, ahead=2)
        return ([batch] for batch in islice(chain.from_iterable(groups), done, None))

    keys = [key for key in asdict(preset) if key.startswith("lm_")]
    # Its matrix products are so small that half precision is slower.
    summary = train_stage(
        run,
        "lm",
        LmTask(lm, tokenizer, preset.lm_edited),
        preset.lm,
        batches,
        fingerprint={key: getattr(preset, key) for key in keys},
        precision="no",
    )
    card = {"made_by": "ip2p storybook build", **{key: summary[key] for key in SUMMARY}}
    save_lm(lm.half(), tokenizer, run.output / PACKAGED_LM, card)
    run.finish("lm", summary)
