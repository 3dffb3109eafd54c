"""Records of `synth`: a text edit (triple), a rejected answer, and a candidate for an image pair.

A triple is a caption, an instruction and the edited caption (paper, section 3.1). Triples are stored as
parquet with the columns `COLUMNS`. JSONL and CSV files can also be read, with the column names of the paper's
code or of the Hugging Face version.
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
from ip2p.data.records import NotText
from ip2p.synth.kinds import kind_of
from ip2p.synth.tables import read_rows

TABLE = "data/train"  # table of a job that writes triples
COLUMNS = ("id", "caption", "instruction", "edited_caption", "source", "kind")
P = (0.1, 0.9)  # paper, section 3.1.2: fraction of the steps with shared attention
SCALE = (7.5, 15.0)  # guidance scale of a candidate (the paper's code)
# The paper's human-written triples use input, edit, output; here, input and output are texts, not pictures.
_NAMES = {
    "caption": (*columns.WORDS["caption"], "input"),
    "instruction": columns.WORDS["instruction"],
    "edited_caption": (*columns.WORDS["edited_caption"], "output"),
    "id": columns.WORDS["id"],
}


@dataclass(frozen=True, kw_only=True)
class Triple:
    """A text edit."""

    id: str  # `triple_id` of the caption and the number of its edit; unique in its file
    caption: str
    instruction: str
    edited_caption: str
    source: str = ""  # the author: a model name, "human", "storybook"
    kind: str = ""  # "whole" or "part", or another label of `kinds`; "": the rule decides

    @property
    def is_whole(self) -> bool:
        """Whether the edit changes the whole picture."""
        return kind_of(self.instruction, self.kind) == "whole"


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A rejected answer of a writer, and why: a key of `instruct.REASONS`."""

    id: str
    caption: str
    text: str  # the raw answer
    reason: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One attempt at an image pair; seed, p and scale are derived from the triple's id and the number."""

    triple: Triple
    number: int  # 0, 1, …
    seed: int  # 32-bit seed of the noise that both pictures share
    p: float  # fraction of the steps with shared attention
    scale: float  # guidance scale
    p_cross: float | None = None  # the same for cross-attention; None: p

    @property
    def id(self) -> str:
        """The triple's id and the number: unique, and the same in every run."""
        return f"{self.triple.id}-{self.number:03}"


def triple_id(caption: str, number: int) -> str:
    """The id of edit `number` of a caption: 16 hex digits, the same on every machine."""
    return _digest("triple", caption, number)[:8].hex()


def derived_seed(*parts: object) -> int:
    """A 32-bit seed derived from numbers and texts, the same on every machine."""
    return int.from_bytes(_digest(*parts)[:4], "big")


def candidate(
    triple: Triple,
    number: int,
    *,
    per_source: int = 1,
    p: tuple[float, float] = P,
    scale: tuple[float, float] = SCALE,
    p_cross: tuple[float, float] | None = None,
) -> Candidate:
    """Candidate `number` of a triple; p, p_cross and the guidance scale are uniform in [low, high).

    All values depend only on the triple's id and the number, so a rerun gives the same pair on any machine.
    Each block of `per_source` candidates shares the seed and the scale of its first one, but not p:
    `PairMaker` then draws the block's source picture once, which reduces the work for n candidates to
    (1 + n) / (2 n).
    """
    own, first = (_digest("candidate", triple.id, n) for n in (number, number - number % per_source))

    def uniform(digest: bytes, place: int, low: float, high: float) -> float:
        bits = int.from_bytes(digest[place : place + 8], "big") >> 11  # 53 bits, the precision of a float
        return low + (high - low) * (bits / 2**53)

    return Candidate(
        triple=triple,
        number=number,
        seed=int.from_bytes(first[:4], "big"),
        p=uniform(own, 8, *p),
        scale=uniform(first, 16, *scale),
        p_cross=None if p_cross is None else uniform(own, 24, *p_cross),
    )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()


def triple_from_row(row: Mapping[str, Any], *, source: str = "", number: int = 0) -> Triple | None:
    """A table row as a triple; None if one of the three texts is missing. A missing id is generated."""
    words = columns.row_texts(row, _NAMES)
    if not all(words[name] for name in ("caption", "instruction", "edited_caption")):
        return None
    return Triple(
        id=words["id"] or triple_id(words["caption"], number),
        caption=words["caption"],
        instruction=words["instruction"],
        edited_caption=words["edited_caption"],
        source=columns.text(row.get("source")) or source,
        kind=columns.text(row.get("kind")),
    )


def triple_table(triples: Iterable[Triple]) -> Any:
    """Triples as a table of `COLUMNS`."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    return pa.Table.from_pylist([asdict(triple) for triple in triples], schema)


def write_triples(path: Path, triples: Iterable[Triple]) -> None:
    """Write triples as parquet, atomically."""
    import pyarrow.parquet as pq

    table = triple_table(triples)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not jobs.is_job(path):
        return read_rows(path)
    if not jobs.is_done(path):
        raise InputError(f"{path} is not finished. Run the command that writes it again.")
    return chain.from_iterable(map(read_rows, jobs.committed(path, TABLE)))


def read_triples(path: Path) -> list[Triple]:
    """Read the triples of a parquet, JSONL or CSV file, or of a job folder, in order.

    In a file without ids, the edits of a caption are numbered. Raises InputError for a missing or unreadable
    file, an unfinished job, a row without one of the three texts, a duplicate id, and an empty file.
    """
    triples: list[Triple] = []
    edits: dict[str, int] = {}
    seen: set[str] = set()
    for place, row in enumerate(_rows(path), 1):
        try:
            caption = columns.row_texts(row, _NAMES)["caption"]
            triple = triple_from_row(row, number=edits.get(caption, 0))
        except NotText as error:
            raise InputError(f"{path}, row {place}: {error.reason}.") from None
        if triple is None:
            raise InputError(
                f"{path}, row {place}: a triple needs a caption, an instruction and an edited_caption; "
                f"this row has {', '.join(str(key) for key in row) or 'nothing'}."
            )
        if triple.id in seen:
            raise InputError(f"{path}, row {place}: duplicate id {triple.id}; remove one of the rows.")
        edits[caption] = edits.get(caption, 0) + 1
        seen.add(triple.id)
        triples.append(triple)
    if not triples:
        raise InputError(f"{path} has no triples. Choose another file.")
    return triples
