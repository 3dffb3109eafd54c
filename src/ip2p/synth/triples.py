"""The seed triples of the project, and measures of a set's diversity.

`seeds.jsonl` was written for this project, sentence by sentence, without templates; `kind` is the type of
edit. It is used to tune a language model that writes edits, or as examples in its prompt.
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
from ip2p.synth.kinds import kind_of
from ip2p.synth.records import Triple, derived_seed, triple_id

SEEDS = Path(__file__).with_name("seeds.jsonl")
SOURCE = "seeds/"  # prefix of a seed's source; its kind follows
NEAR = 0.5  # triples with this Jaccard index or more are near duplicates
OVERLAP_OF = 1000  # triples that are compared with all others to estimate the overlap

Grams = frozenset[str]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Words that may precede the verb of a polite instruction.
_OPENINGS = frozenset(
    ("please", "now", "just", "then", "could", "can", "would", "we", "you", "i", "it", "the", "let's", "to")
)


@dataclass(frozen=True)
class Near:
    """Two similar triples: their positions, and the Jaccard index of their words and word pairs."""

    first: int
    second: int
    likeness: float


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """The diversity of a set of triples; see `measure_diversity`."""

    count: int
    kinds: dict[str, int]  # triples of each kind, where the source gives it
    captions: int  # distinct
    instructions: int  # distinct
    words: int  # distinct, in all texts
    first_words: dict[str, int]  # of the instructions (mostly verbs), most common first
    first_word_entropy: float  # bits
    kept: float  # mean fraction of a caption's words that its edited caption keeps
    changed: float  # fraction of the triples whose edited caption differs from the caption
    overlap: float  # mean similarity of a triple to its nearest neighbor
    near: tuple[Near, ...]  # pairs with a similarity of NEAR or more

    def lines(self) -> list[str]:
        """A summary for display."""
        few = ", ".join(f"{word} {count}" for word, count in list(self.first_words.items())[:8])
        lines = [
            f"{self.count:,} triples, {self.captions:,} captions, {self.instructions:,} instructions, "
            f"{self.words:,} words",
            f"{len(self.first_words):,} first words of instructions, "
            f"{self.first_word_entropy:.1f} bits: {few}",
            f"edited captions keep {self.kept:.0%} of the words; {1 - self.changed:.1%} are unchanged",
            f"mean similarity to the nearest other triple: {self.overlap:.0%}; {len(self.near):,} pairs are "
            f"at least {NEAR:.0%} similar",
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
        triples.append(
            Triple(id=triple_id(row["caption"], 0), source=SOURCE + kind, kind=kind_of("", kind), **row)
        )
    return tuple(triples)


def examples(count: int, *parts: object, of: Sequence[Triple] | None = None) -> list[Triple]:
    """`count` distinct seed triples, drawn by a hash of `parts`: reproducible on any machine."""
    pool = seed_triples() if of is None else of
    return random.Random(derived_seed("examples", *parts)).sample(pool, min(count, len(pool)))


def measure_diversity(triples: Sequence[Triple]) -> Diversity:
    """Kinds, verbs, words and similarity: the Jaccard index of words and word pairs (caption, instruction).

    If there are more than OVERLAP_OF triples, the overlap is estimated from OVERLAP_OF evenly spaced ones.
    """
    grams = [grams_of(triple) for triple in triples]
    openings = Counter(first_word(triple.instruction) for triple in triples)
    kept, changed = [], 0
    for triple in triples:
        before, after = words_in(triple.caption), set(words_in(triple.edited_caption))
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
        words=len({word for text in texts for word in words_in(text)}),
        first_words=dict(openings.most_common()),
        first_word_entropy=-sum(n / total * math.log2(n / total) for n in openings.values()),
        kept=sum(kept) / total,
        changed=changed / total,
        overlap=_overlap(grams),
        near=tuple(near_duplicates(grams)),
    )


def words_in(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.casefold())


def first_word(instruction: str) -> str:
    """The first word of an instruction after polite openings: usually its verb."""
    words = words_in(instruction)
    return next((word for word in words if word not in _OPENINGS), words[0] if words else "")


def grams_of(triple: Triple) -> Grams:
    """The words and the adjacent word pairs of the caption and the instruction."""
    grams: set[str] = set()
    for mark, text in (("c", triple.caption), ("i", triple.instruction)):
        words = words_in(text)
        grams.update(f"{mark} {word}" for word in words)
        grams.update(f"{mark} {a} {b}" for a, b in pairwise(words))
    return frozenset(grams)


def jaccard(one: Grams, other: Grams) -> float:
    """|A ∩ B| / |A ∪ B|, 0 to 1; 1 for two empty sets."""
    shared = len(one & other)
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0


def near_duplicates(grams: Sequence[Grams], threshold: float = NEAR) -> list[Near]:
    """All pairs with a Jaccard index of at least `threshold`, in (0, 1].

    Exact without comparing all pairs: two similar sets have at least one of the |A| − ⌈t |A|⌉ + 1 rarest
    members of each in common (Chaudhuri et al. 2006), so only sets that share a rare member are compared.
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
