"""What crosses the borders of `synth`: a written edit, one that was refused, and a candidate for its pair.

A triple is a caption, an instruction and the caption after it (paper, section 3.1). On disk triples are a
parquet file with the columns of `COLUMNS`; JSONL and CSV files are read too, by the names that the paper's
code and the hub edition give the three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ip2p.base import jobs
from ip2p.base.errors import InputError
from ip2p.base.files import replacing
from ip2p.data import columns
from ip2p.synth.tables import read_rows

TABLE = "data/train"  # of a job that makes triples
COLUMNS = ("id", "caption", "instruction", "edited_caption", "source")
P = (0.1, 0.9)  # paper, section 3.1.2: how large a share of the steps the pair shares its attention
SCALE = (7.5, 15.0)  # the paper's code: the guidance scale of a candidate
# The paper's human-written triples call their parts input, edit, output; these are no pictures here.
_NAMES = {
    "caption": (*columns.WORDS["caption"], "input"),
    "instruction": columns.WORDS["instruction"],
    "edited_caption": (*columns.WORDS["edited_caption"], "output"),
    "id": columns.WORDS["id"],
}


@dataclass(frozen=True, kw_only=True)
class Triple:
    """An edit in words."""

    id: str  # `triple_id` of the caption and the number of its edit; unique in its file
    caption: str
    instruction: str
    edited_caption: str
    source: str = ""  # who wrote it: a model's name, "human", "storybook"


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What a writer answered and was not taken, and why: a code of `instruct.REASONS`."""

    id: str
    caption: str
    text: str  # the answer as it came
    reason: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One try at a pair of pictures; seed, p and scale all come from the id of the triple and the number."""

    triple: Triple
    number: int  # 0, 1, …
    seed: int  # of the noise that both pictures share, 32 bits
    p: float  # share of the steps in which the attention is shared
    scale: float  # guidance scale

    @property
    def id(self) -> str:
        """Unique among all candidates, and the same at every run: the triple's id and the number."""
        return f"{self.triple.id}-{self.number:03}"


def triple_id(caption: str, number: int) -> str:
    """The id of edit `number` of a caption: 16 hex digits, the same wherever it is written."""
    return _digest("triple", caption, number)[:8].hex()


def place_seed(*parts: object) -> int:
    """A seed of 32 bits from numbers and words, the same on every machine."""
    return int.from_bytes(_digest(*parts)[:4], "big")


def candidate(
    triple: Triple,
    number: int,
    *,
    p: tuple[float, float] = P,
    scale: tuple[float, float] = SCALE,
) -> Candidate:
    """Candidate `number` of a triple; p and the guidance scale are uniform in [low, high).

    What is drawn depends on the id of the triple and the number alone, so that a rerun gives the same pair
    wherever it is made.
    """
    digest = _digest("candidate", triple.id, number)

    def uniform(place: int, low: float, high: float) -> float:
        bits = int.from_bytes(digest[place : place + 8], "big") >> 11  # 53, as a float holds
        return low + (high - low) * (bits / 2**53)

    return Candidate(
        triple=triple,
        number=number,
        seed=int.from_bytes(digest[:4], "big"),
        p=uniform(8, *p),
        scale=uniform(16, *scale),
    )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()


def triple_of(row: Mapping[str, Any], *, source: str = "", number: int = 0) -> Triple | None:
    """A row of a table as a triple, None without all three texts; an id is made where it has none."""
    words = columns.words_of(row, _NAMES)
    if not all(words[name] for name in ("caption", "instruction", "edited_caption")):
        return None
    return Triple(
        id=words["id"] or triple_id(words["caption"], number),
        caption=words["caption"],
        instruction=words["instruction"],
        edited_caption=words["edited_caption"],
        source=columns.text(row.get("source")) or source,
    )


def triple_table(triples: Iterable[Triple]) -> Any:
    """Triples as a table of `COLUMNS`."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    return pa.Table.from_pylist([asdict(triple) for triple in triples], schema)


def write_triples(path: Path, triples: Iterable[Triple]) -> None:
    """Write triples as parquet, whole or not at all."""
    import pyarrow.parquet as pq

    table = triple_table(triples)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not jobs.is_job(path):
        return read_rows(path)
    if not jobs.is_done(path):
        raise InputError(f"{path} is not finished. Run the command that makes it again.")
    return chain.from_iterable(map(read_rows, jobs.committed(path, TABLE)))


def read_triples(path: Path) -> list[Triple]:
    """The triples of a parquet, JSONL or CSV file, or of a job's folder, in their order.

    Two edits of a caption in a file without ids are numbered. Raises InputError for a file that is missing
    or cannot be read, a job that was stopped, for rows that lack one of the texts, for an id that comes
    twice, and for no rows.
    """
    triples: list[Triple] = []
    edits: dict[str, int] = {}
    seen: set[str] = set()
    for place, row in enumerate(_rows(path), 1):
        caption = columns.words_of(row, _NAMES)["caption"]
        triple = triple_of(row, number=edits.get(caption, 0))
        if triple is None:
            raise InputError(
                f"{path}, row {place}: a triple needs a caption, an instruction and an edited_caption; "
                f"it has {', '.join(str(key) for key in row) or 'nothing'}."
            )
        if triple.id in seen:
            raise InputError(f"{path}, row {place}: the id {triple.id} comes twice; leave one of them out.")
        edits[caption] = edits.get(caption, 0) + 1
        seen.add(triple.id)
        triples.append(triple)
    if not triples:
        raise InputError(f"{path} has no triples. Name another file.")
    return triples
