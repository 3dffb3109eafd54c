"""The known names of the fields of a row: table columns, JSON keys, members of tar shards."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.data.records import BrokenRow, MissingPart, NotText
from ip2p.settings import part_name

# First the name in the Hugging Face version (if any), then MagicBrush's, then other obvious names.
PICTURES: dict[str, tuple[str, ...]] = {
    "before": (
        *("original_image", "source_img", "before", "source_image", "input_image", "before_image"),
        *("input_img", "src_img", "image_file", "local_input_image", "original", "source", "input"),
        "open_image_input_url",
    ),
    "after": (
        *("edited_image", "target_img", "after", "target_image", "output_image", "after_image"),
        *("output_img", "edited_img", "edited_file", "edited", "target", "output"),
    ),
    "mask": ("mask_img", "mask", "mask_image"),
}
WORDS: dict[str, tuple[str, ...]] = {
    "instruction": (
        *("edit_prompt", "instruction", "edit_instruction", "editing_instruction", "edit", "prompt", "text"),
        "edited_prompt_list",
    ),
    "caption": (
        *("original_prompt", "caption", "original_caption", "source_caption", "input_caption"),
        *("source_prompt", "input_prompt", "before_caption", "input_caption_by_llama"),
    ),
    "edited_caption": (
        *("edited_prompt", "edited_caption", "target_caption", "output_caption"),
        *("target_prompt", "output_prompt", "after_caption", "output_caption_by_llama"),
    ),
    "id": ("id", "key", "pair_id"),
}
# Additional names in the original's prompt.json; in other layouts these names are pictures.
ORIGINAL_WORDS = {
    "instruction": ("edit",),
    "caption": ("caption", "input"),
    "edited_caption": ("output",),
}
SCORES = (
    *("seed", "p2p_threshold", "cfg_scale"),
    *("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"),
)
NEEDED = ("before", "after", "instruction")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
# Captions of sets whose pictures have other names, such as HQ-Edit and AnyEdit.
_SPARE_CAPTIONS = {"caption": "input", "edited_caption": "output"}
_PATH_ENDING = re.compile(r"_?(file_?name|path|file)$")


def find_columns(
    names: Iterable[str], *, of: str, paths: bool = False, chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Maps the fields of a row to the columns that hold them.

    `paths`: pictures are given as file paths, so `before_path` also names before. `chosen`: columns that the
    user names, by field. Raises InputError, with the columns of `of` and the missing fields, unless both
    pictures and an instruction are present, and for a chosen column that is not.
    """
    seen = list(names)
    found = match_columns(seen, of=of, paths=paths, chosen=chosen)
    if lacking := [part for part in NEEDED if part not in found]:
        raise unknown_columns(of, seen, lacking)
    return found


def match_columns(
    seen: Sequence[str], *, of: str, paths: bool = False, chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """As `find_columns`, but fields may be missing."""
    picked = {part: pick(name, seen, part, of=of) for part, name in (chosen or {}).items()}
    plain = {name: fold(name) for name in seen if name not in picked.values()}
    folded: dict[str, str] = {}
    for name, known in plain.items():
        folded.setdefault(known, name)
    for name, known in plain.items() if paths else ():
        folded.setdefault(_PATH_ENDING.sub("", known), name)
    found = {
        part: folded[next(known for known in knowns if known in folded)]
        for part, knowns in (PICTURES | WORDS).items()
        if any(known in folded for known in knowns)
    } | picked
    for part, spare in _SPARE_CAPTIONS.items():
        if part not in found and folded.get(spare, "") not in ("", *found.values()):
            found[part] = folded[spare]
    return found


def fold(name: str) -> str:
    """A column's name without the differences in writing that do not count."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def pick(name: str, seen: Sequence[str], part: str, *, of: str, what: str = "column") -> str:
    """The column that the user calls `name`. Raises InputError when it is not among `seen`."""
    near = {fold(one): one for one in reversed(seen)}
    if name in seen or fold(name) in near:
        return name if name in seen else near[fold(name)]
    raise InputError(
        f"{of} has no {what} {name!r} (--columns {part_name(part)}={name}); it has {_listing(seen)}."
    )


def _listing(seen: Sequence[str]) -> str:
    return (", ".join(seen[:12]) or "(none)") + (", …" if len(seen) > 12 else "")


def unknown_columns(
    of: str, seen: Sequence[str], lacking: Sequence[str], *, what: str = "columns"
) -> InputError:
    """The error for a table that lacks a required field."""
    needs = "; ".join(f"{part} ({', '.join((PICTURES | WORDS)[part][:3])} …)" for part in lacking)
    option = ",".join(f"{part_name(part)}=NAME" for part in lacking)
    return InputError(
        f"{of} has the {what} {_listing(seen)}; missing: {needs}. Rename them, or add --columns {option}."
    )


def row_texts(
    row: Mapping[str, Any],
    names: Mapping[str, Sequence[str]] = WORDS,
    chosen: Mapping[str, str] | None = None,
    *,
    id: str = "",
) -> dict[str, str]:
    """The texts of a row: instruction, caption, edited_caption and id; "" if absent.

    `names`: the known keys by field; `chosen`: keys that the user names, which stand for these; `id`: the
    row's, for the NotText that `text` raises.
    """
    names = {**names, **{part: (key.lower(),) for part, key in (chosen or {}).items()}}
    folded = {str(key).lower(): value for key, value in row.items()}
    found = {}
    for part in WORDS:
        values = (folded[name] for name in names.get(part, ()) if folded.get(name) is not None)
        found[part] = text(next(values, ""), part, id)
    return found


def text(value: object, part: str = "text", id: str = "") -> str:
    """A cell as text, stripped; "" for null. A list gives its first text that is not empty.

    A list written as text, in JSON's or Python's notation, counts as a list; bytes are UTF-8. Raises NotText,
    which names the field `part` and the row `id`, for an object.
    """
    if isinstance(value, str) and value.strip()[:1] + value.strip()[-1:] in ("[]", "()"):
        value = _listed(value.strip())
    if isinstance(value, list | tuple):
        return next((words for one in value if (words := text(one, part, id))), "")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, Mapping | set | frozenset):
        keys = ", ".join(str(key) for key in list(value)[:4])
        raise NotText(id, f"{part}: an object ({keys[:60]}) is no text; name a column of texts")
    return "" if value is None else str(value).strip()


def _listed(words: str) -> object:
    """The list of texts that `words` write out, or `words` themselves."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(words)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | tuple) and all(isinstance(one, str) for one in found):
            return found
    return words


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a row: its score columns, and those in `scores` (a mapping, or its JSON)."""
    inner = row.get("scores")
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except ValueError:
            inner = None
    given = {key: row.get(key) for key in SCORES} | (dict(inner) if isinstance(inner, Mapping) else {})
    return {key: number for key, value in given.items() if (number := _number(value)) is not None}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or value in (None, ""):
        return None
    try:
        if isinstance(value, str):
            number = int(value) if value.lstrip("-").isdigit() else float(value)
        else:
            number = value if isinstance(value, int | float) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if number != number else number  # NaN: pandas writes it for missing values


# --- files ----------------------------------------------------------------------------------------


def stamp(paths: Iterable[Path], *more: object) -> str:
    """A short hash of the names, sizes and modification times of files, including which are missing."""
    digest = hashlib.blake2b(repr(more).encode(), digest_size=12)
    for path in paths:
        try:
            known = os.stat(path)
            digest.update(f"{path.name}\x1f{known.st_size}\x1f{known.st_mtime_ns}\x1e".encode())
        except OSError:
            digest.update(f"{path.name}\x1f-\x1e".encode())
    return digest.hexdigest()


def read_picture(path: Path | None, part: str, id: str) -> bytes:
    """The bytes of a picture file. Raises MissingPart (also if `path` is None) and BrokenRow."""
    if path is None:
        raise MissingPart(id, f"{part}: no picture is given")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if match := re.search(r"(https?):/+(.*)", path.as_posix()):
            address = f"{match[1]}://{match[2]}"
            raise MissingPart(
                id, f"{part}: {address} is an address; download the picture and name its file"
            ) from None
        raise MissingPart(id, f"{part}: the picture {path} is missing") from None
    except OSError as error:
        raise BrokenRow(id, f"{part}: {path} cannot be read ({error.strerror})") from None


_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


def of_split(names: Sequence[str], split: str, *, of: str) -> list[str]:
    """The file names (with `/`) that belong to a split; all of them if no name contains a split.

    The split is in the file name or a folder name: train-00000-of-00009.parquet, data/train/0000.parquet.
    Raises InputError if there are only other splits.
    """
    splits = {name: {word for word in re.split(r"[^A-Za-z]+", name.lower()) if word} for name in names}
    chosen = [name for name in names if split.lower() in splits[name]]
    others = sorted({word for words in splits.values() for word in words & set(_SPLITS)})
    if chosen or not others:
        return chosen or list(names)
    raise InputError(f"{of} has no split {split}; it has {', '.join(others)}. Choose with --split.")
