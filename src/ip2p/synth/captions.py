"""Reads captions from a table or a Hugging Face data set; cleans, filters, deduplicates and samples them."""

from __future__ import annotations

import hashlib
import heapq
import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.base.files import is_hub_name
from ip2p.data import hub
from ip2p.synth.settings import Language
from ip2p.synth.tables import ENDINGS, LINE, parquet_rows, read_rows

# Column names in lower case; the first non-empty one is used. LAION: TEXT, URL, AESTHETIC_SCORE, NSFW,
# punsafe, LANGUAGE.
NAMES = {
    "text": ("text", "caption", "captions", "prompt", "original_prompt", "input", "description", LINE),
    "url": ("url", "image_url", "caption_url", "source_url"),
    "score": ("aesthetic_score", "aesthetic", "aesthetics", "aesthetics_score", "score"),
    "nsfw": ("nsfw",),
    "unsafe": ("punsafe", "unsafe"),
    "language": ("language", "lang"),
}
UNSAFE = 0.5  # the threshold that LAION recommends for punsafe
LOOK = 100_000  # rows searched for a known column: a stream may have billions

# Sexual, gory and hateful words. They match whole words, ignoring case, and their plurals in s or es.
BLOCK_LIST = (
    *("nude", "nudity", "naked", "topless", "nsfw", "porn", "porno", "pornographic", "pornstar", "hentai"),
    *("xxx", "erotic", "erotica", "sex", "sexy", "sexual", "sexually", "blowjob", "handjob", "cum", "orgasm"),
    *("orgy", "masturbation", "masturbating", "dildo", "vibrator", "vagina", "penis", "genital", "genitalia"),
    *("boob", "tits", "nipple", "milf", "bdsm", "bondage", "fetish", "striptease", "stripper", "escort"),
    *("upskirt", "panties", "lingerie", "prostitute", "hooker", "slut", "whore", "bitch", "fuck", "fucking"),
    *("shit", "cunt", "dick pic", "cock ring", "rape", "raped", "rapist", "incest", "molest", "pedophile"),
    *("paedophile", "lolita", "loli", "shota", "bestiality", "zoophilia", "gore", "gory", "beheading"),
    *("beheaded", "decapitated", "decapitation", "disembowelled", "dismembered", "mutilated", "corpse"),
    *("suicide", "hanging body", "torture", "tortured", "genocide", "lynching", "nazi", "swastika"),
    *("white power", "ku klux klan", "nigger", "nigga", "faggot", "fag", "kike", "chink", "spic", "gook"),
    *("wetback", "raghead", "tranny", "retard", "retarded"),
)
# The most common short words of English and of some other languages, to tell the languages apart.
_ENGLISH = (
    *("the", "of", "and", "in", "with", "on", "at", "for", "by", "from", "to", "is", "an", "over", "under"),
    *("her", "his", "its", "their", "this", "that", "into", "near", "through", "as", "are"),
)
_OTHERS = (
    *("der", "die", "das", "und", "mit", "ein", "eine", "einem", "einer", "auf", "im", "vom", "zum", "für"),
    *("le", "les", "du", "des", "une", "et", "dans", "sur", "avec", "pour", "aux", "est", "qui"),
    *("el", "los", "las", "una", "del", "con", "para", "por", "y", "que", "su", "unos"),
    *("il", "lo", "gli", "di", "della", "nel", "per", "e", "che", "sul", "alla"),
    *("o", "os", "um", "uma", "do", "da", "dos", "em", "na", "ao"),
    *("het", "een", "van", "op", "met", "voor", "och", "ett", "på", "av", "som", "og", "til", "med"),
    *("w", "z", "na", "się", "jest", "dla", "ve", "bir", "ile"),
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption, with its metadata from the table."""

    text: str
    url: str = ""
    score: float | None = None  # aesthetic score by LAION's predictor, 1 to 10


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which captions are accepted."""

    min_words: int = 2
    max_words: int = 50  # CLIP reads 75 tokens
    max_characters: int = 300
    min_score: float | None = None  # minimum aesthetic score; captions without a score are then skipped
    language: Language = "english"
    block: Sequence[str] = BLOCK_LIST


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions that were read. rows: rows in the input; left_out: skipped rows by reason."""

    captions: list[Caption]
    rows: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A summary of what was skipped, for display."""
        if not self.left_out:
            return []
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return [f"{len(self.captions):,} captions from {self.rows:,} rows; skipped: {reasons}"]


def read_captions(
    path: str | Path,
    *,
    column: str | None = None,
    rules: Rules | None = None,
    sample: int | None = None,
    seed: int = 0,
    split: str = "train",
    revision: str | None = None,
    stream: bool = False,
) -> Captions:
    """Read captions from a .txt, .jsonl, .csv, .tsv or .parquet file, a folder, or a Hugging Face data set.

    column: the caption column; by default the first of `NAMES` with a text. If a cell holds a list, its first
    text is used. A row without a caption counts as empty. sample: the number of captions to draw with `seed`:
    those with the lowest hash of seed and caption, in hash order. The sample does not depend on the order of
    the rows, and a larger sample starts with the smaller one. split, revision, stream: for a Hugging Face
    data set. Raises InputError for an unreadable input, an unknown column or no captions left, and ModelError
    for errors of the Hugging Face Hub.
    """
    if sample is not None and sample < 1:
        raise InputError(f"--sample is {sample}; use 1 or more, or leave it out for all captions.")
    return take(
        _rows(str(path), split=split, revision=revision, stream=stream),
        of=str(path),
        column=column,
        rules=rules or Rules(),
        sample=sample,
        seed=seed,
    )


def take(
    rows: Iterable[Mapping[str, Any]],
    *,
    of: str,
    column: str | None = None,
    rules: Rules,
    sample: int | None = None,
    seed: int = 0,
) -> Captions:
    """The captions of a table's rows that satisfy the rules; each caption and each URL once."""
    left_out: Counter[str] = Counter()
    blocked = blocker(rules.block)
    seen: set[bytes] = set()
    heap: list[tuple[int, int, Caption]] = []  # the sample; the highest hash is at the top
    taken: list[Caption] = []
    names = NAMES["text"] if column is None else (column.strip().lower(),)
    known, seen_columns = False, dict[str, None]()
    number = 0
    for number, row in enumerate(rows, 1):
        cells = {str(key).strip().lower(): value for key, value in row.items()}
        known = known or any(name in cells for name in names)
        if not known:
            seen_columns.update(dict.fromkeys(cells))
            if number == LOOK:
                break
        caption = Caption(
            text=next(filter(None, (clean(_text(cells.get(name))) for name in names)), ""),
            url=_text(_cell(cells, "url")),
            score=_number(_cell(cells, "score")),
        )
        reason = _left_out(caption, cells, rules, blocked)
        # A repeated caption or a second caption of the same picture adds no new edit.
        keys = [_hash(key_of(caption.text))] + ([_hash(caption.url)] if caption.url else [])
        if reason is None and any(key in seen for key in keys):
            reason = "doubled"
        if reason is not None:
            left_out[reason] += 1
            continue
        seen.update(keys)
        if sample is None:
            taken.append(caption)
            continue
        rank = int.from_bytes(_hash(f"{seed}\x1f{key_of(caption.text)}"), "big")
        push = heapq.heappush if len(heap) < sample else heapq.heappushpop
        push(heap, (-rank, -number, caption))
    if number and not known:
        raise _no_column(of, column, list(seen_columns))
    if sample is not None:
        taken = [caption for _, _, caption in sorted(heap, reverse=True)]
        if undrawn := number - sum(left_out.values()) - len(taken):
            left_out["not drawn"] = undrawn
    if not taken:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "no rows"
        raise InputError(
            f"{of} has no usable captions: {reasons}. Relax the limits, or choose another input."
        )
    return Captions(captions=taken, rows=number, left_out=dict(left_out))


def _rows(path: str, *, split: str, revision: str | None, stream: bool) -> Iterator[dict[str, Any]]:
    here = Path(path).expanduser()
    if here.exists() or not is_hub_name(path):
        for flag, used in (("--revision", revision is not None), ("--stream", stream)):
            if used and here.exists():
                raise InputError(f"{path} is a local path, so {flag} does not apply; remove it.")
        return read_rows(here)
    if stream:
        names, _ = hub.remote_files(path, split, revision)
        system = hub.filesystem()
        return parquet_rows([system.open(name, "rb") for name in names])
    return parquet_rows(hub.cached_files(path, split, revision)[0])


def _text(value: object) -> str:
    """The text of a cell, or the first text of a list; "" for anything else (a number, a mapping)."""
    if isinstance(value, list):
        return next(filter(None, map(_text, value)), "")
    return value.strip() if isinstance(value, str) else ""


def _no_column(of: str, column: str | None, seen: Sequence[str]) -> InputError:
    shown = ", ".join(seen[:12]) or "(none)"
    # `tables` skips list and struct columns of parquet files.
    parquet = Path(of).suffix.lower() not in set(ENDINGS) - {".parquet"}
    flat = " (in parquet, only columns of plain values are read)" if parquet else ""
    lacking = "known caption column" if column is None else f"column {column}"
    return InputError(f"{of} has no {lacking}. Its columns: {shown}{flat}. Choose one with --column.")


def _cell(cells: Mapping[str, Any], part: str) -> Any:
    return next((cells[name] for name in NAMES[part] if cells.get(name) is not None), None)


def _number(value: object) -> float | None:
    """A cell as a finite number; None if it is not one (NaN counts as unknown)."""
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _left_out(
    caption: Caption, cells: Mapping[str, Any], rules: Rules, blocked: Callable[[str], str | None]
) -> str | None:
    """Why a caption is skipped, phrased to follow a count; None if it is accepted."""
    words = caption.text.split()
    if not words:
        return "empty"
    if len(words) < rules.min_words:
        return "too short"
    if len(words) > rules.max_words or len(caption.text) > rules.max_characters:
        return "too long"
    if rules.min_score is not None and (caption.score is None or caption.score < rules.min_score):
        return "below the score"
    unsafe = _number(_cell(cells, "unsafe"))
    if _text(_cell(cells, "nsfw")).upper() == "NSFW" or (unsafe is not None and unsafe >= UNSAFE):
        return "unsafe by their table"
    if blocked(caption.text):
        return "on the block-list"
    declared = _text(_cell(cells, "language")).lower()
    if rules.language == "english" and (declared or "en") not in ("en", "eng", "english"):
        return "in another language"
    if not is_in(caption.text, rules.language):
        return "in another language"
    return None


# --- texts ----------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One clean line: no markup, entities decoded, no control characters, no enclosing quotes."""
    text = re.sub(r"<[^<>]{1,200}>", " ", html.unescape(text))
    text = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in text)
    text = " ".join(text.split())
    while len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("'", "'"), ("“", "”"), ("«", "»")):
        text = text[1:-1].strip()
    return text


def key_of(text: str) -> str:
    """A normalized text for comparison: case, whitespace and outer punctuation are ignored."""
    return " ".join(text.casefold().split()).strip(" .!?,;:")


def is_in(text: str, language: Language) -> bool:
    """Whether a text may be in a language, judged by its letters and, for English, by common words.

    latin: at least 90% of the letters are Latin. english: in addition, at most 10% of the letters are
    non-ASCII (two are always allowed), and the text does not have two or more common words of other languages
    and at least as many as English ones.
    """
    if language == "any":
        return True
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return False
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    if latin < 0.9 * len(letters):
        return False
    if language == "latin":
        return True
    if sum(not letter.isascii() for letter in letters) > max(2, 0.1 * len(letters)):
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    other, english = (sum(word in known for word in words) for known in (_OTHERS, _ENGLISH))
    return not (other >= 2 and other >= english)


def blocker(words: Sequence[str]) -> Callable[[str], str | None]:
    """A function that returns the first blocked word of a text, or None."""
    kept = sorted({" ".join(word.casefold().split()) for word in words} - {""}, key=len, reverse=True)
    if not kept:
        return lambda text: None
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, kept)) + r")(?:e?s)?(?!\w)")

    def find(text: str) -> str | None:
        found = pattern.search(" ".join(text.casefold().split()))
        return found[1] if found else None

    return find


def read_block_list(path: Path) -> tuple[str, ...]:
    """The words of a file, one per line; # starts a comment. Raises InputError."""
    lines = (str(row.get(LINE, "")).split("#")[0].strip() for row in read_rows(path))
    return tuple(dict.fromkeys(line for line in lines if line))


def _hash(text: str) -> bytes:
    # A URL from JSON can contain half of a surrogate pair.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
