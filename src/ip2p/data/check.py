"""Checks a data set, row by row and as a whole, and draws a contact sheet of pairs.

A defect is certain: a broken or missing picture, an instruction without words, a duplicate id. A warning
comes from a rule of thumb, which its line states, or is a fact worth knowing before training.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import string
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from ip2p.data.align import find_move
from ip2p.data.records import BrokenRow, MissingPart, NotText, Pair, Source, open_picture
from ip2p.pictures import images

SHOWN = 5  # ids listed per finding
OF_ENDLESS = 1000  # rows checked in an endless source
MANY = 10  # rows with one instruction that are worth a line
MAX_TOKENS = 77  # of CLIP, including start and end tokens
ON_SHEET, SHEET_COLUMNS, SHEET_SIDE = 24, 3, 160

# First words of instructions that are rare in captions.
_VERBS = """
    add adjust apply attach become blur bring brighten can change clear color colour convert could cover
    crop cut darken decorate delete do dress draw enlarge erase exchange expand extend fill flip get give
    have hide include increase insert keep let lets let's lower lighten make modify move need paint place
    please position put recolor recolour reduce remove render repaint replace resize restore rotate set
    sharpen shift show shrink style swap switch take transform translate transfer turn use wear zoom
"""
IMPERATIVES = frozenset(_VERBS.split())


@dataclass(frozen=True)
class Finding:
    """One kind of problem: its rule, the number of rows, and the first ids."""

    name: str
    kind: Literal["defect", "warning"]
    rule: str  # what the name means
    count: int
    ids: tuple[str, ...]  # the first SHOWN, with reasons where they differ

    def line(self) -> str:
        more = ", …" if self.count > len(self.ids) else ""
        rows = f"{self.count:,} row{'s' if self.count != 1 else ''}"
        return f"{self.name:<20}{rows}: {self.rule}: {', '.join(self.ids)}{more}"


@dataclass(frozen=True)
class Report:
    """The result of `check`. looked_at: the number of rows checked, from the first row."""

    name: str
    rows: int
    looked_at: int
    findings: tuple[Finding, ...]
    sizes: dict[str, int]  # width x height of the picture before: number of rows
    lengths: dict[
        str, dict[str, Any]
    ]  # instruction, caption, edited_caption: min, median, max words, over 77

    @property
    def defects(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == "defect"]

    def lines(self) -> list[str]:
        """The report for display, one fact per line."""
        part = "" if self.looked_at == self.rows else f"; checked the first {self.looked_at:,}"
        rows = f"{self.rows:,} rows" if self.rows < 2**31 else "endless"
        lines = [f"{'data':<20}{self.name}, {rows}{part}"]
        if self.sizes:
            common = sorted(self.sizes.items(), key=lambda size: -size[1])
            shown = ", ".join(f"{size} ({count:,})" for size, count in common[:3])
            more = f" and {len(common) - 3} more" if len(common) > 3 else ""
            lines.append(f"{'sizes':<20}{shown}{more}")
        for name, lengths in self.lengths.items():
            if not lengths["rows"]:
                lines.append(f"{name:<20}none")
                continue
            lines.append(
                f"{name:<20}{lengths['min']} / {lengths['median']:g} / {lengths['max']} words "
                f"(min / median / max), "
                f"about {lengths['long']:,} over {MAX_TOKENS} tokens"
                + (f", {lengths['empty']:,} empty" if lengths["empty"] else "")
            )
        lines += [finding.line() for finding in self.findings]
        return lines if self.findings else [*lines, f"{'found':<20}no problems"]

    def summary(self) -> str:
        """The defects in one line."""
        found = ", ".join(f"{finding.name} {finding.count:,}" for finding in self.defects)
        return f"{self.name} has defects: {found}. Fix or remove these rows."

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.name,
            "rows": self.rows,
            "looked_at": self.looked_at,
            "sizes": self.sizes,
            "lengths": self.lengths,
            "findings": [
                {"name": f.name, "kind": f.kind, "rule": f.rule, "rows": f.count, "ids": list(f.ids)}
                for f in self.findings
            ],
        }


# --- one row --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """The facts kept about a row: its texts, the hashes of its pictures, and its own findings."""

    id: str
    words: tuple[str, str, str] = ("", "", "")  # instruction, caption, edited caption
    before: bytes = b""
    after: bytes = b""
    size: tuple[int, int] | None = None
    found: dict[str, str] = field(default_factory=dict)  # finding: reason


def _look(pair: Pair | BrokenRow) -> _Row:
    if isinstance(pair, NotText):
        return _Row(pair.id, found={"no words": pair.reason})
    if isinstance(pair, BrokenRow):
        name = "missing picture" if isinstance(pair, MissingPart) else "broken picture"
        return _Row(pair.id, found={name: pair.reason})
    words = (pair.instruction, pair.caption, pair.edited_caption)
    found: dict[str, str] = {}
    if not pair.instruction.strip():
        found["empty instruction"] = ""
    elif reason := why_no_words(pair.instruction):
        found["no words"] = reason
    elif pair.instruction in (pair.caption, pair.edited_caption):
        found["caption for instruction"] = ""
    elif imperative(pair.caption or pair.edited_caption) and not imperative(pair.instruction):
        found["swapped words"] = ""
    opened = []
    for part, data in (("before", pair.before), ("after", pair.after)):
        try:
            opened.append(open_picture(data, pair.id))
        except BrokenRow as error:
            found["broken picture"] = f"{part}: {error.reason}"
    if len(opened) < 2:
        return _Row(pair.id, words, found=found)
    one, two = opened
    for part, picture in zip(("before", "after"), opened, strict=True):
        bands: Any = picture.getextrema()
        if all(low == high for low, high in bands):
            found["blank picture"] = part
    if one.size != two.size:
        found["size mismatch"] = "{}x{} and {}x{}".format(*one.size, *two.size)
    hashes = _hash(one), _hash(two)
    if hashes[0] == hashes[1]:
        found["identical pictures"] = ""
    elif one.size == two.size and (move := find_move(one, two)):
        found["misaligned"] = str(move)
    return _Row(pair.id, words, *hashes, one.size, found)


def why_no_words(text: str) -> str:
    """What a text is that says nothing to a person: "a number", "a file name", …; "" for words."""
    plain = text.strip()
    if plain.lower() in ("nan", "none", "null", "n/a", "na", "<na>", "undefined", "nat"):
        return "a missing value written out"
    for pattern, name in _NO_WORDS.items():
        if re.fullmatch(pattern, plain, re.IGNORECASE | re.DOTALL):
            return name
    if plain[0] in "[{(":
        for read, name in ((json.loads, "JSON"), (ast.literal_eval, "Python's notation of a value")):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                if not isinstance(read(plain), str):
                    return name
    return ""


_SIGNS = re.escape(string.punctuation)
_NO_WORDS = {
    r"[-+]?[\d.,]+(e[-+]?\d+)?%?": "a number",
    r"[a-z]+://\S+": "an address",
    r"\S+\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic|txt|json)": "a file name",
    r"b'.*'|b\".*\"|<[\w.]+ (object|image) .*>": "Python's notation of a value",
    rf"[{_SIGNS}\s]+": "signs alone",
}


def imperative(words: str) -> bool:
    """Whether a sentence starts like an instruction: "make it …", "please turn …", "now add …"."""
    first = re.findall(r"[a-z']+", words.lower())[:2]
    if len(first) == 2 and first[0] in ("now", "then", "just", "and", "also"):
        first = first[1:]
    return bool(first) and first[0] in IMPERATIVES


def tokens(words: str) -> int:
    """The estimated number of CLIP tokens: one per sign, and one per 8 letters of a word."""
    return 2 + sum(math.ceil(len(part) / 8) for part in re.findall(r"\w+|[^\w\s]", words))


def _hash(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()


# --- all rows -------------------------------------------------------------------------------------

_DEFECTS = {
    "broken picture": "cannot be read or decoded",
    "missing picture": "a picture or the texts of the row are missing",
    "empty instruction": "the instruction is empty",
    "no words": "the instruction is a number, a name, a missing value, or something else that is not words",
    "duplicate ids": "an id that occurs more than once",
}
_WARNINGS = {
    "caption for instruction": "the instruction equals a caption; the column may hold captions",
    "one instruction": "all rows have the same instruction",
    "blank picture": "a picture has a single color",
    "swapped words": "the caption starts like an instruction and the instruction does not; the columns "
    "may be swapped",
    "swapped pictures": "pairs share the picture after rather than the picture before; before and after may "
    "be swapped",
    "size mismatch": "before and after have different sizes",
    "misaligned": "unchanged parts are not in the same place",
    "duplicate pairs": "same pictures and instruction as an earlier row",
    "identical pictures": "before and after are the same",
}


def check(
    source: Source,
    *,
    limit: int | None = None,
    jobs: int | None = None,
    done: Callable[[], None] = lambda: None,
) -> Report:
    """Read every row, or the first `limit`, and report the problems.

    Pictures are decoded in `jobs` threads; `done` is called once per row.
    """
    count = len(source) if not source.endless else OF_ENDLESS
    count = min(count, limit) if limit is not None else count
    rows = []
    for row in _looked_at(source, count, jobs or min(8, os.cpu_count() or 1)):
        rows.append(row)
        done()
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        for name, reason in row.found.items():
            found[name].append((row.id, reason))
    for name, ids in (
        ("duplicate ids", _repeated(rows)),
        ("duplicate pairs", _duplicates(rows)),
        ("swapped pictures", _swapped_pictures(rows)),
        ("one instruction", _one_instruction(rows)),
    ):
        found[name] = [(id, "") for id in ids]
    kinds: list[tuple[Literal["defect", "warning"], dict[str, str]]] = [
        ("defect", _DEFECTS),
        ("warning", _WARNINGS),
    ]
    findings = tuple(
        Finding(
            name,
            kind,
            rule,
            len(found[name]),
            tuple(f"{id} ({reason})" if reason else id for id, reason in found[name][:SHOWN]),
        )
        for kind, rules in kinds
        for name, rule in rules.items()
        if found[name]
    )
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.size:
            sizes[f"{row.size[0]}x{row.size[1]}"] += 1
    read = [row for row in rows if not {"missing picture", "broken picture"} & row.found.keys()]
    lengths = {
        name: _lengths([row.words[which] for row in read])
        for which, name in enumerate(("instruction", "caption", "edited caption"))
    }
    return Report(source.name, len(source), count, findings, dict(sizes), lengths)


def _looked_at(source: Source, count: int, jobs: int) -> Iterator[_Row]:
    """The checked rows in order: this thread reads the source (it is not thread-safe), others decode."""
    waiting: deque[Future[_Row]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number in range(count):
                try:
                    pair: Pair | BrokenRow = source[number]
                except BrokenRow as error:
                    pair = error
                waiting.append(pool.submit(_look, pair))
                if len(waiting) > 4 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _lengths(texts: Sequence[str]) -> dict[str, Any]:
    words = [len(text.split()) for text in texts if text]
    return {
        "rows": len(words),
        "empty": len(texts) - len(words),
        "min": min(words, default=0),
        "median": statistics.median(words) if words else 0,
        "max": max(words, default=0),
        "long": sum(tokens(text) > MAX_TOKENS for text in texts),
    }


def _one_instruction(rows: Sequence[_Row]) -> list[str]:
    """All rows, if they are many and have one instruction."""
    same = len({row.words[0] for row in rows}) == 1 and len(rows) >= MANY and rows[0].words[0]
    return [row.id for row in rows] if same else []


def _repeated(rows: Sequence[_Row]) -> list[str]:
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        seen[row.id] += 1
    return [id for id, times in seen.items() if times > 1]


def _duplicates(rows: Sequence[_Row]) -> list[str]:
    seen = set()
    again = []
    for row in rows:
        if row.before:
            pair = row.before, row.after, " ".join(row.words[0].lower().split())
            if pair in seen:
                again.append(row.id)
            seen.add(pair)
    return again


def _swapped_pictures(rows: Sequence[_Row]) -> list[str]:
    """The rows whose pictures before and after may be swapped, judged by how rows share pictures.

    Edits of one picture share it as `before`, with its caption. A row is suspect if its `after` is the
    `before` of other rows with the same caption (without captions: of at least two others) and its own
    `before` occurs nowhere else. Rows are also suspect if they end at the same picture from different ones
    although their captions say that they start from the same one (without captions: three rows or more).
    Chained edits (A to B, B to C) are not.
    """
    starts, ends = defaultdict(list), defaultdict(list)
    for row in rows:
        if row.before and row.before != row.after:
            starts[row.before].append(row)
            ends[row.after].append(row)
    suspect = []
    for row in rows:
        if not row.before or row.before == row.after:
            continue
        others = [other for other in starts.get(row.after, ()) if other is not row]
        lone = len({other.after for other in starts[row.before]}) == 1 and row.before not in ends
        caption = row.words[1]
        if others and lone:
            alike = [other for other in others if other.words[1] == caption]
            if (caption and alike) or (not caption and len(others) >= 2):
                suspect.append(row.id)
        elif not others and lone:
            group = ends[row.after]
            froms = {other.before for other in group}
            captions = {other.words[1] for other in group}
            if len(froms) == len(group) and len(captions) == 1:
                edited = {other.words[2] for other in group}
                if (caption and len(group) >= 2 and len(edited) == len(group)) or (
                    not caption and len(group) >= 3
                ):
                    suspect.append(row.id)
    return suspect


# --- contact sheet --------------------------------------------------------------------------------


def sheet(source: Source, path: Path, *, count: int = ON_SHEET, limit: int | None = None) -> None:
    """Write a contact sheet of up to `count` pairs with their instructions, evenly spaced over the rows.

    For an endless source, or with `limit`, only the first rows are used. A broken row is shown as its error.
    Raises InputError as `images.check_picture_output` does.
    """
    total = min(len(source) if not source.endless else OF_ENDLESS, limit or len(source))
    count = min(count, total)
    shown = sorted({number * total // count for number in range(count)})
    rows, labels = [], []
    for number in shown:
        try:
            pair = source[number]
            both = [open_picture(data, pair.id) for data in (pair.before, pair.after)]
            rows.append([ImageOps.pad(one, (SHEET_SIDE, SHEET_SIDE), color="white") for one in both])
            labels.append(pair.instruction or "(no instruction)")
        except BrokenRow as error:
            rows.append([Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), "lightgrey")] * 2)
            labels.append(f"{error.id}: {error.reason}")
    whole = sheet_in_columns(rows, labels, header=("before", "after"), columns=SHEET_COLUMNS, letters=52)
    images.save_image(whole, path)


def sheet_in_columns(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    header: Sequence[str],
    columns: int,
    letters: int,
) -> Image.Image:
    """A contact sheet with its rows in several columns. Labels are cut to `letters`, so they do not overlap.

    The letters of Pillow's font are about 6 pixels wide at this size.
    """
    labels = [label if len(label) <= letters else label[: letters - 1] + "…" for label in labels]
    high = -(-len(rows) // columns)
    parts = [
        images.contact_sheet(rows[k : k + high], labels[k : k + high], header=header, font_size=12)
        for k in range(0, len(rows), high)
    ]
    whole = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        whole.paste(part, (sum(left.width for left in parts[:number]), 0))
    return whole
