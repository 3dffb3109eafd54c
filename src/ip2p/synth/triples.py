"""The project's own seed triples, and how varied a set of triples is.

`seeds.jsonl` was written for this project, sentence by sentence and not from templates; a
`kind` says what each edit is about. A model that is to write edits learns from it, or is shown some of it.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from ip2p.synth.captions import key_of
from ip2p.synth.records import Triple, place_seed, triple_id

SEEDS = Path(__file__).with_name("seeds.jsonl")
SOURCE = "seeds/"  # what the source of a seed begins with; its kind follows
NEAR = 0.5  # the Jaccard index from which on two triples say the same
OVERLAP_OF = 1000  # so many triples are compared with all to tell how alike the set is

Grams = frozenset[str]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# What comes before the verb of a polite instruction.
_OPENINGS = frozenset(
    ("please", "now", "just", "then", "could", "can", "would", "we", "you", "i", "it", "the", "let's", "to")
)


@dataclass(frozen=True)
class Near:
    """Two triples that are alike: their places, and the Jaccard index of their words and pairs of words."""

    first: int
    second: int
    likeness: float


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How varied a set of triples is; see `measure`."""

    count: int
    kinds: dict[str, int]  # how many of each, where the source tells the kind
    captions: int  # different ones
    instructions: int  # different ones
    words: int  # different ones in all the texts
    first_words: dict[str, int]  # of the instructions, the commonest first: mostly their verbs
    first_word_entropy: float  # bits
    kept: float  # mean share of a caption's words that its edited caption keeps
    changed: float  # share of the triples whose edited caption differs from the caption
    overlap: float  # mean likeness of a triple to the one most like it
    near: tuple[Near, ...]  # pairs of likeness NEAR or more

    def lines(self) -> list[str]:
        """The figures for a person."""
        few = ", ".join(f"{word} {count}" for word, count in list(self.first_words.items())[:8])
        lines = [
            f"{self.count:,} triples, {self.captions:,} captions, {self.instructions:,} instructions, "
            f"{self.words:,} words",
            f"{len(self.first_words):,} first words of instructions, "
            f"{self.first_word_entropy:.1f} bits: {few}",
            f"edited captions keep {self.kept:.0%} of the words; {1 - self.changed:.1%} are unchanged",
            f"the nearest other triple is {self.overlap:.0%} alike on average; {len(self.near):,} pairs are "
            f"{NEAR:.0%} alike or more",
        ]
        if self.kinds:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.items())
            lines.append(f"{len(self.kinds)} kinds: {kinds}")
        return lines


@cache
def seed_triples() -> tuple[Triple, ...]:
    """The triples of `seeds.jsonl`; the source of each is `seeds/KIND`."""
    triples = []
    for line in SEEDS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = row.pop("kind")
        triples.append(Triple(id=triple_id(row["caption"], 0), source=SOURCE + kind, **row))
    return tuple(triples)


def examples(count: int, *parts: object, of: Sequence[Triple] | None = None) -> list[Triple]:
    """`count` different seeds, drawn by a hash of `parts`: the same wherever they are asked for."""
    pool = seed_triples() if of is None else of
    return random.Random(place_seed("examples", *parts)).sample(pool, min(count, len(pool)))


def measure(triples: Sequence[Triple]) -> Diversity:
    """Kinds, verbs, words, and how alike triples are: the Jaccard index of the words and pairs of words of
    caption and instruction. The overlap is that of OVERLAP_OF triples, evenly spread, if there are more."""
    grams = [grams_of(triple) for triple in triples]
    openings = Counter(first_word(triple.instruction) for triple in triples)
    kept, changed = [], 0
    for triple in triples:
        before, after = words_of(triple.caption), set(words_of(triple.edited_caption))
        kept.append(sum(word in after for word in before) / max(1, len(before)))
        changed += key_of(triple.caption) != key_of(triple.edited_caption)
    texts = (text for t in triples for text in (t.caption, t.instruction, t.edited_caption))
    kinds = Counter(t.source[len(SOURCE) :] for t in triples if t.source.startswith(SOURCE))
    total = max(1, len(triples))
    return Diversity(
        count=len(triples),
        kinds=dict(kinds.most_common()),
        captions=len({key_of(t.caption) for t in triples}),
        instructions=len({key_of(t.instruction) for t in triples}),
        words=len({word for text in texts for word in words_of(text)}),
        first_words=dict(openings.most_common()),
        first_word_entropy=-sum(n / total * math.log2(n / total) for n in openings.values()),
        kept=sum(kept) / total,
        changed=changed / total,
        overlap=_overlap(grams),
        near=tuple(near_duplicates(grams)),
    )


def words_of(text: str) -> list[str]:
    """The words of a text in small letters."""
    return _WORD.findall(text.casefold())


def first_word(instruction: str) -> str:
    """The word that an instruction begins with, after what is only polite: mostly its verb."""
    words = words_of(instruction)
    return next((word for word in words if word not in _OPENINGS), words[0] if words else "")


def grams_of(triple: Triple) -> Grams:
    """The words and the pairs of neighbouring words of the caption and the instruction."""
    grams: set[str] = set()
    for mark, text in (("c", triple.caption), ("i", triple.instruction)):
        words = words_of(text)
        grams.update(f"{mark} {word}" for word in words)
        grams.update(f"{mark} {a} {b}" for a, b in pairwise(words))
    return frozenset(grams)


def jaccard(one: Grams, other: Grams) -> float:
    """|A ∩ B| / |A ∪ B|, 0 to 1; of two empty sets 1."""
    shared = len(one & other)
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0


def near_duplicates(grams: Sequence[Grams], threshold: float = NEAR) -> list[Near]:
    """All pairs with a Jaccard index of `threshold` or more, of the range (0, 1].

    Exact, and far from comparing all with all: two sets that are alike share one of the rarest
    |A| − ⌈t |A|⌉ + 1 members of each (Chaudhuri et al. 2006), so only those with such a one in common are
    compared.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}, not in (0, 1]")
    frequency = Counter(gram for each in grams for gram in each)
    index: dict[str, list[int]] = {}
    found = []
    for number, each in enumerate(grams):
        rare = sorted(each, key=lambda gram: (frequency[gram], gram))
        rare = rare[: len(each) - math.ceil(threshold * len(each) - 1e-9) + 1]
        met = dict.fromkeys(place for gram in rare for place in index.get(gram, ()))
        for place in met:
            likeness = jaccard(grams[place], each)
            if likeness >= threshold:
                found.append(Near(place, number, likeness))
        for gram in rare:
            index.setdefault(gram, []).append(number)
    return sorted(found, key=lambda near: (near.first, near.second))


def _overlap(grams: Sequence[Grams]) -> float:
    if len(grams) < 2:
        return 0.0
    index: dict[str, list[int]] = {}
    for number, each in enumerate(grams):
        for gram in each:
            index.setdefault(gram, []).append(number)
    chosen = range(0, len(grams), -(-len(grams) // OVERLAP_OF))
    total = 0.0
    for number in chosen:
        shared = Counter(place for gram in grams[number] for place in index[gram])
        del shared[number]
        total += max(
            (count / (len(grams[number]) + len(grams[place]) - count) for place, count in shared.items()),
            default=0.0,
        )
    return total / len(chosen)
