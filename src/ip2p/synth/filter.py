"""Filters pairs by their four CLIP similarities, keeps the best pairs of each edit, and removes duplicates.

Three steps: a job scores every row (the slow part); the rows to keep are selected in memory from all scores;
a second job writes them. The scores are saved next to the kept pairs, so other thresholds need no rescoring.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from ip2p.base import jobs, terminal
from ip2p.base.devices import pick_device
from ip2p.base.errors import InputError
from ip2p.base.jobs import StageOutput
from ip2p.data import columns
from ip2p.data.convert import encoded, ending, hub_schema
from ip2p.data.parquet import ParquetSource
from ip2p.data.records import BrokenRow, Pair, Source, open_picture
from ip2p.models.bundle import called
from ip2p.models.clip import Clip, similarities
from ip2p.pictures.images import to_tensor
from ip2p.synth.kinds import Kind, kind_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Column (named as in the paper's code): the similarity that it holds.
SIMILARITIES = {
    "clip_sim_image": "image_image",
    "clip_sim_0": "text_image_before",
    "clip_sim_1": "text_image_after",
    "clip_sim_dir": "directional",
}
KEPT, SCORED = "data/train", "scores/scores"  # tables of the two jobs
SCORES_FOLDER = "scores"
TOP, TOP_WHOLE = 4, 1  # pairs kept per edit: of a part, as in the paper, and of the whole picture
NEAR_BITS = 4
PART_ROWS = 1000
CLIP_SIDE = 512
DECIMALS = 6  # hides the last bits of a similarity, which depend on the batch

STORYBOOK = "storybook"  # the name of the drawn world, its model and its CLIP

Safety = Callable[[Sequence[Image.Image]], Sequence[bool]]  # which pictures are safe


# --- thresholds -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Minimum similarities: picture and picture, picture and caption (both), and directional."""

    image: float
    caption: float
    directional: float

    def least(self) -> dict[str, float]:
        """The thresholds by column."""
        return dict(
            zip(SIMILARITIES, (self.image, self.caption, self.caption, self.directional), strict=True)
        )

    def passes(self, scores: Mapping[str, float]) -> bool:
        """Whether a pair passes; unknown similarities (pairs without captions) are ignored."""
        return not any(scores.get(name, math.nan) < least for name, least in self.least().items())


PRESETS = {
    "paper": Thresholds(image=0.75, caption=0.2, directional=0.2),  # section 3.1.2, with ViT-L/14
    "code": Thresholds(image=0.70, caption=0.2, directional=0.2),  # the released code's defaults
    # With its own small CLIP: docs/synth.md.
    "storybook": Thresholds(image=0.2, caption=0.5, directional=0.5),
}


def preset_for(clips: Collection[str]) -> str:
    """The preset for scores measured with these CLIPs (values of the column `clip`).

    Cosines of different CLIPs are not comparable, so the storybook's CLIP has its own thresholds. Any other
    CLIP, or a mixture, gets the paper's.
    """
    named = {clip for clip in clips if clip}
    return STORYBOOK if named == {STORYBOOK} else "paper"


def clips_of(source: Source) -> set[str]:
    """The CLIPs that scored the rows of a data set: the values of `clip` in local parquet files."""
    if not isinstance(source, ParquetSource):
        return {STORYBOOK} if source.name == STORYBOOK else set()
    paths = [path for path in _local_files(source) if "clip" in pq.read_schema(path).names]
    found = (pc.unique(pq.read_table(path, columns=["clip"])["clip"]).to_pylist() for path in paths)
    return {clip for clips in found for clip in clips if clip}


def _local_files(source: Source) -> list[str]:
    """The parquet files of a source on this machine; none for other sources."""
    return source.files if isinstance(source, ParquetSource) and not source.remote else []


# --- scores ---------------------------------------------------------------------------------------


def measure_similarities(
    clip: Clip,
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    captions: Sequence[str],
    edited_captions: Sequence[str],
    *,
    batch: int = 32,
) -> dict[str, NDArray[np.float64]]:
    """The four similarities of each pair of RGB pictures and captions, by column, [pairs] each.

    NaN where a required caption is empty. Pictures may have any size; those above 512 pixels are downscaled.
    """
    unique = list(dict.fromkeys(chain(captions, edited_captions)))
    place = {text: number for number, text in enumerate(unique)}
    texts = torch.cat([clip.texts(unique[k : k + batch]) for k in range(0, len(unique), batch)])
    found = similarities(
        _embedded(clip, before, batch),
        _embedded(clip, after, batch),
        texts[[place[text] for text in captions]],
        texts[[place[text] for text in edited_captions]],
    )
    scores = {
        name: getattr(found, of).double().cpu().numpy().round(DECIMALS) for name, of in SIMILARITIES.items()
    }
    no_caption, no_edited = (np.array([not t.strip() for t in each]) for each in (captions, edited_captions))
    scores["clip_sim_0"][no_caption] = np.nan
    scores["clip_sim_1"][no_edited] = np.nan
    scores["clip_sim_dir"][no_caption | no_edited] = np.nan
    return scores


def _embedded(clip: Clip, pictures: Sequence[Image.Image], batch: int) -> torch.Tensor:
    """Embeddings [pictures, features]; pictures of the same size are batched together."""
    sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
    small = [_small(picture) for picture in pictures]
    for number, picture in enumerate(small):
        sizes[picture.size].append(number)
    order = list(chain.from_iterable(sizes.values()))
    parts = [
        clip.images((torch.cat([to_tensor(small[k]) for k in alike[start : start + batch]]) + 1) / 2)
        for alike in sizes.values()
        for start in range(0, len(alike), batch)
    ]
    return torch.cat(parts)[np.argsort(order)]


def _small(picture: Image.Image) -> Image.Image:
    # CLIP's bicubic resize has no antialiasing: a full-size photograph would be sampled at single pixels.
    if max(picture.size) <= CLIP_SIDE:
        return picture
    picture = picture.copy()
    picture.thumbnail((CLIP_SIDE, CLIP_SIDE), Image.Resampling.LANCZOS)
    return picture


_COSINES = np.cos(np.pi / 64 * np.outer(range(8), range(1, 64, 2)))  # DCT-II: [frequency, pixel]


def picture_hash(picture: Image.Image) -> int:
    """A 64-bit perceptual hash (pHash); scaling, encoding or slight brightening hardly change it.

    The bits say which of the 8 x 8 lowest frequencies of the picture's discrete cosine transform at 32 x 32
    are above their median, as in `imagehash.phash`, which would bring SciPy and a second of imports.
    """
    gray = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = (_COSINES @ gray @ _COSINES.T).round(6)  # rounded, so that a flat picture has only its mean
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


@dataclass(frozen=True)
class Scored:
    """Facts about each row of a data set, in row order, [rows] each.

    edits: a hash of caption, instruction and edited caption, equal for all candidates of an edit.
    instructions: for a broken row, the error. hashes: perceptual hashes of both pictures, uint64 [rows, 2],
    zeros if not computed. flaws: "broken", "unsafe" or "". clips: the CLIP that measured the row, "" for
    scores that the row already had. scores: by column, NaN where unknown. labels: kinds of edit
    as the data set names them; empty without them.
    """

    ids: list[str]
    edits: list[str]
    instructions: list[str]
    hashes: NDArray[np.uint64]
    flaws: list[str]
    clips: list[str]
    scores: dict[str, NDArray[np.float64]]
    labels: Sequence[str] = ()

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each row's edit, by its label or by the rule."""
        labels = self.labels or [""] * len(self)
        return [kind_of(words, label) for words, label in zip(self.instructions, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int | None) -> Scored:
        """The first `count` rows; None for all."""
        scores = {name: values[:count] for name, values in self.scores.items()}
        rest = {name: values[:count] for name, values in vars(self).items() if name != "scores"}
        return Scored(**rest, scores=scores)

    def of(self, row: int) -> dict[str, float]:
        """The known scores of a row."""
        return {n: float(v[row]) for n, v in self.scores.items() if not np.isnan(v[row])}


_SCORE_FIELDS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "edit", "instruction", "flaw", "clip")),
        *(("hash_0", pa.uint64()), ("hash_1", pa.uint64())),
        *((name, pa.float64()) for name in SIMILARITIES),
    ]
)


@dataclass(kw_only=True)
class Scorer:
    """The stage that scores rows of a source: it maps a range of rows to a table of scores.

    Rows that have all four similarities keep them unless `rescore` is set, so CLIP is loaded on first use.
    find_clip: the CLIP's folder, or a function that returns it; clip_name: its name in the table. safety:
    makes a function that says which pictures are safe; a pair with an unsafe picture gets the flaw "unsafe".
    """

    source: Source
    find_clip: Path | Callable[[], Path] | None
    clip_name: str
    device: str
    batch: int
    rescore: bool
    safety: Callable[[], Safety] | None

    def __post_init__(self) -> None:
        self.clip: Clip | None = None
        self.is_safe = self.safety() if self.safety is not None else None

    def __call__(self, part: range) -> StageOutput:
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter(scored=0, broken=0)
        # In batches, because a thousand decoded pairs do not fit in memory.
        for start in range(0, len(part), self.batch):
            rows += self._scored(part[start : start + self.batch], counts)
        return StageOutput(tables={SCORED: pa.Table.from_pylist(rows, _SCORE_FIELDS)}, counts=counts)

    def _scored(self, part: range, counts: Counter[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        readable: list[tuple[dict[str, Any], Pair, list[Image.Image]]] = []
        for number in part:
            try:
                pair = self.source[number]
                both = [open_picture(data, pair.id) for data in (pair.before, pair.after)]
            except BrokenRow as error:
                rows.append(_broken(error))
                counts["broken"] += 1
                continue
            rows.append(_facts(pair, both))
            readable.append((rows[-1], pair, both))
        unscored = [
            each
            for each in readable
            if self.rescore or not all(name in each[1].scores for name in SIMILARITIES)
        ]
        if unscored:
            counts["scored"] += len(unscored)
            found = self._measured([pair for _, pair, _ in unscored], [both for *_, both in unscored])
            for number, (row, *_) in enumerate(unscored):
                values = {name: each[number].item() for name, each in found.items()}
                row |= {name: None if math.isnan(value) else value for name, value in values.items()}
                row["clip"] = self.clip_name
        if self.is_safe is not None and readable:
            safe = list(self.is_safe([picture for *_, both in readable for picture in both]))
            for (row, *_), one, two in zip(readable, safe[::2], safe[1::2], strict=True):
                row["flaw"] = "" if one and two else "unsafe"
        return rows

    def _measured(
        self, pairs: Sequence[Pair], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, NDArray[np.float64]]:
        if self.clip is None:
            if self.find_clip is None:
                raise InputError(
                    f"{pairs[0].id} of {self.source.name} has no similarities; choose a CLIP to measure "
                    "them: --clip openai/clip-vit-large-patch14"
                )
            folder = self.find_clip() if callable(self.find_clip) else self.find_clip
            self.clip = Clip.load(folder, pick_device(self.device))
        before, after = zip(*pictures, strict=True)
        captions, edited = [p.caption for p in pairs], [p.edited_caption for p in pairs]
        return measure_similarities(self.clip, before, after, captions, edited, batch=self.batch)


def _broken(error: BrokenRow) -> dict[str, Any]:
    return {"id": error.id, "edit": "", "instruction": error.reason, "flaw": "broken", "clip": ""}


def _facts(pair: Pair, pictures: Sequence[Image.Image] = ()) -> dict[str, Any]:
    words = repr((pair.caption, pair.instruction, pair.edited_caption))
    hashes = [picture_hash(picture) for picture in pictures] or [0, 0]
    if not pair.caption:  # the instruction alone does not identify the edit
        words += str(hashes[0] or pair.id)
    facts: dict[str, Any] = {"id": pair.id, "instruction": pair.instruction, "flaw": "", "clip": ""}
    facts["edit"] = hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
    facts |= {"hash_0": hashes[0], "hash_1": hashes[1]}
    return facts | {name: pair.scores.get(name) for name in SIMILARITIES}


def score_rows(
    source: Source,
    folder: Path,
    *,
    clip: Path | Callable[[], Path] | None = None,
    clip_name: str = "",
    clip_key: str = "",
    device: str = "cpu",
    batch: int = 32,
    rescore: bool = False,
    safety: Callable[[], Safety] | None = None,
    count: int | None = None,
    part_rows: int = PART_ROWS,
    overwrite: bool = False,
    say: Callable[[str], None] = terminal.say,
    **workers: Any,
) -> Scored:
    """Score every row of `source`, or the first `count`, as a job in `folder`; existing scores are kept.

    clip, clip_name, device, batch, rescore, safety: as in `Scorer`. clip_key: identifies the weights of the
    CLIP, to detect a change of weights. workers: cluster, processes and threads of `jobs.run_job`.
    Raises InputError for an endless source without a count, and as `jobs.run_job` does.
    """
    if source.endless and count is None:
        raise InputError(f"{source.name} is endless; set a number of rows, such as --count 10000.")
    total = len(source) if count is None else min(count, len(source))
    name = clip_name or (called(clip) if isinstance(clip, Path) else "")
    settings = {"source": source.name, "key": source.key, "rows": total, "part_rows": part_rows}
    settings |= {"clip": name or None, "rescore": rescore, "safety": _name_of(safety)}
    settings |= {"content of --clip": clip_key} if clip_key else {}
    more: dict[str, Any] = {"device": device, "batch": batch, "rescore": rescore, "safety": safety}
    jobs.run_job(
        partial(Scorer, source=source, find_clip=clip, clip_name=name, **more),
        [range(start, min(start + part_rows, total)) for start in range(0, total, part_rows)],
        folder,
        settings=settings,
        unit="pairs",
        overwrite="changed" if overwrite else False,
        say=say,
        **workers,
    )
    return read_scores(folder, source)


def read_scores(folder: Path, source: Source) -> Scored:
    """Read the scores of `source` that a job wrote to a folder. Raises InputError for any other folder."""
    tables = [pq.read_table(path) for path in jobs.committed(folder, SCORED)]
    return _scored(pa.concat_tables(tables) if tables else _SCORE_FIELDS.empty_table(), source)


def known_scores(source: Source, count: int | None = None) -> Scored:
    """The scores stored in the rows of `source`; pictures are neither decoded nor compared."""
    rows = []
    for row in range(len(source) if count is None else min(count, len(source))):
        try:
            rows.append(_facts(source[row]))
        except BrokenRow as error:
            rows.append(_broken(error))
    return _scored(pa.Table.from_pylist(rows, _SCORE_FIELDS), source)


def _scored(table: Any, source: Source) -> Scored:
    def numbers(name: str, kind: Any, null: Any) -> Any:
        return table[name].combine_chunks().fill_null(null).to_numpy(zero_copy_only=False).astype(kind)

    return Scored(
        ids=table["id"].to_pylist(),
        edits=table["edit"].to_pylist(),
        instructions=table["instruction"].to_pylist(),
        hashes=np.stack([numbers(f"hash_{k}", np.uint64, 0) for k in (0, 1)], axis=1),
        flaws=table["flaw"].to_pylist(),
        clips=table["clip"].to_pylist(),
        scores={name: numbers(name, np.float64, np.nan) for name in SIMILARITIES},
        labels=_labels(source)[: table.num_rows],
    )


def _labels(source: Source) -> list[str]:
    """The column `kind` of local parquet files; empty without it."""
    files = _local_files(source)
    if not all("kind" in pq.read_schema(path).names for path in files):
        return []
    tables = (pq.read_table(path, columns=["kind"])["kind"] for path in files)
    return [columns.text(label) for table in tables for label in table.to_pylist()]


def _name_of(safety: Callable[[], Safety] | None) -> str | None:
    """The name of a function or class; for a `functools.partial`, with its arguments."""
    if safety is None:
        return None
    if isinstance(safety, partial):
        return f"{_name_of(safety.func)} {safety.args} {safety.keywords}"
    return getattr(safety, "__qualname__", type(safety).__qualname__)


# --- selection -----------------------------------------------------------------------------------

# Why a row is removed; the first that applies counts.
REASONS = (
    *("broken", "unsafe", "clip_sim_image", "clip_sim_0", "clip_sim_1", "clip_sim_dir"),
    *("duplicate", "surplus"),
)


def select(
    scored: Scored,
    thresholds: Thresholds,
    *,
    top: int | None = TOP,
    top_whole: int | None = None,
    near_bits: int | None = NEAR_BITS,
) -> list[str]:
    """For each row, why it is removed: one of `REASONS`, or "" if it is kept.

    A row with a similarity below its threshold is removed. Pairs with the same instruction (letters and
    digits, ignoring case) whose pictures' hashes both differ by at most `near_bits` of 64 bits are
    duplicates; the best is kept. None skips this check. Of the rest, the `top` best pairs of each edit are
    kept, of edits of the whole picture the `top_whole` best; None: as many as of the others. top=None keeps
    all. Pairs are ranked by directional similarity, then image similarity, then row number.
    """
    reasons = list(scored.flaws)
    for name, least in thresholds.least().items():
        for row in np.flatnonzero(scored.scores[name] < least).tolist():
            reasons[row] = reasons[row] or name
    ranks = [-np.nan_to_num(scored.scores[name], nan=-2) for name in ("clip_sim_image", "clip_sim_dir")]
    passing = [row for row in np.lexsort(ranks).tolist() if not reasons[row]]
    if near_bits is not None:
        for row in _repeated(scored, passing, near_bits):
            reasons[row] = "duplicate"
    if top is None:
        return reasons
    kinds: Sequence[Kind] = scored.kinds if top_whole is not None else ["part"] * len(scored)
    quotas = {"part": top, "whole": min(top, top if top_whole is None else top_whole)}
    taken: Counter[str] = Counter()
    for row in passing:
        if not reasons[row]:
            taken[scored.edits[row]] += 1
            if taken[scored.edits[row]] > quotas[kinds[row]]:
                reasons[row] = "surplus"
    return reasons


def _repeated(scored: Scored, rows: Sequence[int], bits: int) -> Iterator[int]:
    """The rows (best first) that nearly repeat an earlier row that is kept."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if scored.hashes[row].any():  # zero: not computed
            words = "".join(letter for letter in scored.instructions[row].lower() if letter.isalnum())
            groups[words].append(row)
    for group in groups.values():
        kept = np.empty((len(group), 2), np.uint64)
        count = 0
        for row in group:
            own = scored.hashes[row]
            if (np.bitwise_count(kept[:count] ^ own) <= bits).all(axis=1).any():
                yield row
            else:
                kept[count], count = own, count + 1


# --- writing the kept pairs --------------------------------------------------------------------


@dataclass(frozen=True)
class Filtered:
    """The result of a filter. reasons: removed rows by first reason; unknown: rows without captions."""

    rows: int
    kept: int
    reasons: dict[str, int]
    unknown: int
    whole: int = 0  # kept pairs of edits of the whole picture

    def lines(self) -> list[str]:
        """A summary for display."""
        share = f" ({self.kept / self.rows:.1%})" if self.rows else ""
        lines = [f"{self.kept:,} of {self.rows:,} pairs kept{share}"]
        if self.kept:
            lines.append(f"{self.whole:,} of them ({self.whole / self.kept:.0%}) change the whole picture")
        if self.reasons:
            lines.append("removed: " + ", ".join(f"{name} {count:,}" for name, count in self.reasons.items()))
        if self.unknown:
            lines.append(f"{self.unknown:,} pairs have no captions and were judged by the other scores")
        return lines


def filter_pairs(
    source: Source,
    folder: Path,
    thresholds: Thresholds,
    *,
    top: int | None = TOP,
    top_whole: int | None = TOP_WHOLE,
    near_bits: int | None = NEAR_BITS,
    overwrite: bool = False,
    part_rows: int = PART_ROWS,
    say: Callable[[str], None] = terminal.say,
    **scoring: Any,
) -> Filtered:
    """Score `source` into `folder`/scores and write the rows to keep, with their scores, into `folder`.

    The rows are written as parquet with the columns of the Hugging Face version; for a local parquet source,
    with all its columns and its pictures byte for byte. scoring: arguments of `score_rows`. A call after an
    interruption resumes; `overwrite` with other thresholds keeps the scores. Raises InputError as `run_job`
    does, and for the folder of another stage, which `overwrite` does not replace.
    """
    beside = ("run.json", SCORES_FOLDER)
    jobs.check_folder(folder, beside=beside)  # before the scoring, which may take days
    if jobs.is_job(folder) and "near_bits" not in jobs.settings(folder):
        raise InputError(f"{folder} contains the output of another command; choose another folder.")
    scored = score_rows(
        source, folder / SCORES_FOLDER, part_rows=part_rows, overwrite=overwrite, say=say, **scoring
    )
    reasons = select(scored, thresholds, top=top, top_whole=top_whole, near_bits=near_bits)
    kept = [row for row, reason in enumerate(reasons) if not reason]
    settings = {"source": source.name, "key": source.key, "rows": len(scored), **asdict(thresholds)}
    settings |= {"top": top, "top_whole": top_whole, "near_bits": near_bits}
    settings |= {"part_rows": part_rows, "kept": _hash_of(scored, kept)}
    table = _Rows.of(source)
    for line in _lost(source, kept) if table is None else ():
        say(line)
    jobs.run_job(
        partial(PairWriter, source, scored, table),
        [kept[start : start + part_rows] for start in range(0, len(kept), part_rows)],
        folder,
        settings=settings,
        unit="pairs",
        overwrite=overwrite,
        beside=beside,
        say=say,
    )
    counts = Counter(reasons)
    unscored = np.isnan(scored.scores["clip_sim_dir"]) & (np.array(scored.flaws) == "")
    kinds = scored.kinds
    return Filtered(
        rows=len(reasons),
        kept=len(kept),
        reasons={name: counts[name] for name in REASONS if counts[name]},
        unknown=int(unscored.sum()),
        whole=sum(kinds[row] == "whole" for row in kept),
    )


def _lost(source: Source, kept: Sequence[int]) -> Iterator[str]:
    """Warnings for data that the written table cannot hold; only used when rows are not copied whole."""
    if not kept:
        return
    if names := {name for path in _local_files(source) for name in pq.read_schema(path).names}:
        written = set(columns.find_columns(sorted(names), of=source.name).values()) | set(PAIR_SCHEMA.names)
        if more := sorted(names - written):
            why = "its files have different columns, or its pictures are separate files"
            yield f"warning: the columns {', '.join(more)} of {source.name} are not written: {why}"
    if source[kept[0]].mask is not None:
        yield f"warning: the masks of {source.name} are not written; ip2p data convert writes masks"


def _hash_of(scored: Scored, kept: Sequence[int]) -> str:
    """A hash of the kept rows and their scores."""
    facts = [[row, scored.ids[row], scored.of(row)] for row in kept]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class PairWriter:
    """The stage that writes rows with their scores: it maps row numbers to a table."""

    def __init__(self, source: Source, scored: Scored, table: _Rows | None) -> None:
        self.source, self.scored, self.table = source, scored, table
        self.measured = any(scored.clips)  # over all parts, so that they have the same columns

    def __call__(self, part: Sequence[int]) -> StageOutput:
        if self.table is not None:
            return StageOutput(tables={KEPT: self._with_scores(self.table.take(part), part)})
        pairs = (self.source[row] for row in part)
        rows = [
            pair_row(pair, f"{row:07}", clip=self.scored.clips[row] or None, **self.scored.of(row))
            for pair, row in zip(pairs, part, strict=True)
        ]
        return StageOutput(tables={KEPT: pair_table(rows)})

    def _with_scores(self, table: Any, part: Sequence[int]) -> Any:
        """A table of a parquet source with the scores in their columns, and an id column if it has none."""
        names, ids, clips = table.column_names, self.scored.ids, self.scored.clips
        scores = [self.scored.of(row) for row in part]
        new: dict[str, tuple[str, list[Any]]] = {
            name: ("float64", [each.get(name) for each in scores]) for name in SIMILARITIES
        }
        if "id" not in names:
            new["id"] = ("string", [ids[row] for row in part])
        if self.measured or "clip" in names:
            before = table["clip"].to_pylist() if "clip" in names else [None] * len(part)
            new["clip"] = ("string", [clips[row] or old for row, old in zip(part, before, strict=True)])
        if "scores" in names:  # readers prefer it to the separate columns
            kind = table.schema.field("scores").type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_struct(kind):
                cells = zip(table["scores"].to_pylist(), scores, strict=True)
                new["scores"] = ("string", [_merged(cell, each) for cell, each in cells])
        schema = with_columns(table.schema, {name: kind for name, (kind, _) in new.items()})
        arrays = [
            pa.array(new[field.name][1], field.type) if field.name in new else table[field.name]
            for field in schema
        ]
        return pa.table(arrays, schema=schema)


def _merged(cell: object, scores: Mapping[str, float]) -> str:
    """A cell of the column `scores` (a mapping or its JSON), updated; any other cell is unchanged."""
    old = cell or {}
    if isinstance(old, str):
        try:
            old = json.loads(old)
        except ValueError:
            return str(cell)
    return json.dumps({**old, **scores}) if isinstance(old, Mapping) else str(cell)


class _Rows:
    """The rows of local parquet files, with all their columns."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.groups: list[tuple[int, int]] = []
        self.starts = [0]
        for number, path in enumerate(self.files):
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    self.groups.append((number, group))
                    self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)

    @classmethod
    def of(cls, source: Source) -> _Rows | None:
        """None for other sources, for files with different columns, and for pictures in separate files."""
        files = _local_files(source)
        schemas = [pq.read_schema(path) for path in files]
        if not files or not all(each.equals(schemas[0]) for each in schemas):
            return None
        rows = cls(files)
        # Relative picture paths would not resolve from another folder.
        places = columns.find_columns(schemas[0].names, of=source.name)
        held = [rows.first(places[part]) for part in ("before", "after")]
        held = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in held]
        return rows if all(isinstance(data, bytes) for data in held) else None

    def first(self, name: str) -> Any:
        """The first non-empty cell of a column, or None."""
        for path in self.files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1, columns=[name]):
                    if (cell := batch[0][0].as_py()) and (not isinstance(cell, dict) or any(cell.values())):
                        return cell
        return None

    def take(self, rows: Sequence[int]) -> Any:
        """The given rows; their numbers must be ascending."""
        tables: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            place = bisect_right(self.starts, row) - 1
            tables[place].append(row - self.starts[place])
        taken = []
        for place, inner in tables.items():
            number, group = self.groups[place]
            with pq.ParquetFile(self.files[number]) as file:
                taken.append(file.read_row_group(group).take(inner))
        return pa.concat_tables(taken)


# --- tables of pairs ------------------------------------------------------------------------------

_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}


def with_columns(schema: Any, kinds: Mapping[str, str]) -> Any:
    """A schema with columns added or retyped, also in the Hugging Face metadata."""
    for name, kind in kinds.items():
        field = pa.field(name, _TYPES[kind])
        place = schema.get_field_index(name)
        schema = schema.append(field) if place < 0 else schema.set(place, field)
    notes = dict(schema.metadata or {})
    if b"huggingface" in notes:
        note = json.loads(notes[b"huggingface"])
        features = note.get("info", {}).get("features")
        if features is not None:
            features |= {name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()}
            schema = schema.with_metadata(notes | {b"huggingface": json.dumps(note).encode()})
    return schema


# The columns of the Hugging Face version, the pair's provenance, and its scores.
PAIR_SCHEMA = with_columns(
    hub_schema(
        {
            **{"original_image": "Image", "original_prompt": "string", "edit_prompt": "string"},
            **{"edited_prompt": "string", "edited_image": "Image", "id": "string"},
        }
    ),
    {
        **{"triple_id": "string", "candidate": "int64", "seed": "int64"},
        **{name: "float64" for name in ("p2p_threshold", "cfg_scale", *SIMILARITIES)},
        **{name: "string" for name in ("model", "clip", "license", "kind")},
    },
)


def pair_row(pair: Pair, stem: str = "", **more: object) -> dict[str, Any]:
    """A pair as a row of `PAIR_SCHEMA`. more: triple_id, candidate, model, clip, license and other columns.

    stem: prefix of the picture names, by default the pair's id. Pixels are encoded as PNG.
    """
    return {
        "original_image": picture_cell(pair.before, f"{stem or pair.id}_0"),
        "original_prompt": pair.caption,
        "edit_prompt": pair.instruction,
        "edited_prompt": pair.edited_caption,
        "edited_image": picture_cell(pair.after, f"{stem or pair.id}_1"),
        "id": pair.id,
        **{name: value for name, value in pair.scores.items() if name in columns.SCORES},
        **more,
    }


def pair_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows of `pair_row` as a table that a stage can return."""
    return pa.Table.from_pylist(list(rows), PAIR_SCHEMA)


def picture_cell(picture: bytes | NDArray[np.uint8], stem: str) -> dict[str, object]:
    """A picture as a Hugging Face image cell; pixels are encoded as PNG."""
    data = encoded(picture)
    return {"bytes": data, "path": stem + ending(data)}
