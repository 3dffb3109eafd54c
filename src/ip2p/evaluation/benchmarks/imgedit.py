"""ImgEdit's basic benchmark (Ye et al. 2025): basic_edit.json, prompts.json and pictures; for a judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ip2p.base.errors import InputError
from ip2p.evaluation.benchmarks.files import picture_at, read_object
from ip2p.evaluation.rows import EvalRow

HOMES = (".", "original_images", "singleturn", "Benchmark/singleturn")  # where its archive may be unpacked


@dataclass(frozen=True)
class ImageEdit:
    """An entry of basic_edit.json."""

    id: str
    picture: Path
    prompt: str
    kind: str


def read_imgedit_edits(folder: Path, published: bool) -> list[ImageEdit]:
    """The entries with their picture files. Raises InputError if there are none."""
    edits = read_object(folder, "basic_edit.json", "singleturn.json")
    first = next(iter(edits.values()))["id"] if edits else ""
    home = next((folder / name for name in HOMES if (folder / name / first).is_file()), None)
    if home is None:
        raise InputError(f"{folder} has no picture {first}; unpack the benchmark's archive into it.")
    return [
        ImageEdit(key, home / each["id"], each["prompt"], each["edit_type"]) for key, each in edits.items()
    ]


def make_imgedit_row(edit: ImageEdit) -> EvalRow:
    return EvalRow(id=edit.id, before=picture_at(edit.picture, edit.id), turns=(edit.prompt,), kind=edit.kind)
