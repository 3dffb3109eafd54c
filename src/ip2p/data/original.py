"""The folder layout of the paper's code: one folder per prompt, with the pictures of each kept seed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.data import columns
from ip2p.data.handles import Lately
from ip2p.data.records import BrokenRow, MissingPart, Pair
from ip2p.settings import part_name

SEEDS, PROMPT, METADATA = "seeds.json", "prompt.json", "metadata.jsonl"
_PICTURE = re.compile(r"(\d+)_[01]\.(jpg|jpeg|png|webp)")


def is_original(folder: Path) -> bool:
    """Whether a folder has this layout: a seeds.json, or a prompt.json in one of its first entries."""
    if (folder / SEEDS).is_file():
        return True
    with os.scandir(folder) as entries:
        for _, entry in zip(range(1000), entries, strict=False):
            if entry.is_dir() and os.path.exists(os.path.join(entry.path, PROMPT)):
                return True
    return False


class OriginalSource:
    """One row per seed pair, in the order of seeds.json; without that file, the folders are searched.

    The id is NAME/SEED, unless metadata.jsonl contains one. Raises InputError for an unreadable seeds.json
    and for a folder without pairs.
    """

    endless = False

    def __init__(self, folder: Path, *, name: str, chosen: Mapping[str, str] | None = None) -> None:
        self.folder, self.name, self._chosen = folder, name, dict(chosen or {})
        if fixed := [part_name(part) for part in self._chosen if part not in columns.ORIGINAL_WORDS]:
            raise InputError(
                f"{name} has the layout of the paper's code; the pictures of this layout have fixed names; "
                f"leave {', '.join(fixed)} away from --columns."
            )
        self._rows = self._listed() if (folder / SEEDS).is_file() else self._found()
        if not self._rows:
            raise InputError(f"{name} has no pairs: no NAME/{PROMPT} with SEED_0.jpg and SEED_1.jpg in it.")
        self._prompts: Lately[Any] = Lately(2)

    def _listed(self) -> list[tuple[str, int]]:
        path = self.folder / SEEDS
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return [(str(name), int(seed)) for name, seeds in entries for seed in seeds]
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{path} cannot be read as [[name, [seed, ...]], ...]. "
                "Remove it to search the folders instead."
            ) from None

    def _found(self) -> list[tuple[str, int]]:
        rows = []
        for name in sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir()):
            files = os.listdir(self.folder / name)
            if PROMPT in files:
                # Match either picture, so that a missing one is reported rather than skipped.
                found = {int(match[1]) for file in files if (match := _PICTURE.fullmatch(file))}
                rows += [(name, seed) for seed in sorted(found)]
        return rows

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row, known without reading any."""
        return [name for name, _ in self._rows]

    @cached_property
    def key(self) -> str:
        names = dict.fromkeys(name for name, _ in self._rows)
        files = (
            Path(entry.path)
            for name in names
            if (self.folder / name).is_dir()
            for entry in sorted(os.scandir(self.folder / name), key=lambda entry: entry.name)
        )
        return columns.stamp(files, "original", self._rows, *sorted(self._chosen.items()))

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self) -> list[range]:
        return [range(len(self))]

    def __getitem__(self, row: int) -> Pair:
        name, seed = self._rows[row]
        id = f"{name}/{seed}"
        words, metadata = self._prompts.get(name, lambda: _prompt(self.folder / name, self._chosen))
        line = metadata.get(seed, {})
        id = columns.text(line.get("id")) or id
        if isinstance(words, str):
            raise MissingPart(id, words)
        return Pair(
            id=id,
            before=self._picture(name, seed, 0, id),
            after=self._picture(name, seed, 1, id),
            instruction=words["instruction"],
            caption=words["caption"],
            edited_caption=words["edited_caption"],
            scores={"seed": seed} | columns.scores_of({k: v for k, v in line.items() if k != "id"}),
        )

    def _picture(self, name: str, seed: int, which: int, id: str) -> bytes:
        stem = self.folder / name / f"{seed}_{which}"
        part = ("before", "after")[which]
        for ending in (".jpg", ".png", ".jpeg", ".webp"):
            if (path := stem.with_name(stem.name + ending)).exists():
                return columns.read_picture(path, part, id)
        raise MissingPart(id, f"{part}: the picture {stem}.jpg is missing")


def _prompt(
    folder: Path, chosen: Mapping[str, str]
) -> tuple[dict[str, str] | str, dict[int, dict[str, Any]]]:
    """The texts of a prompt (or why they are missing), and its metadata by seed."""
    metadata: dict[int, dict[str, Any]] = {}
    try:
        for line in (folder / METADATA).read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                metadata[int(values["seed"])] = values
            except (ValueError, KeyError, TypeError):
                continue  # a bad line loses only scores
    except (OSError, ValueError):
        pass
    try:
        prompt = json.loads((folder / PROMPT).read_text(encoding="utf-8"))
        return columns.row_texts(prompt, columns.ORIGINAL_WORDS, chosen), metadata
    except BrokenRow as error:
        return error.reason, metadata
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder / PROMPT} is missing or cannot be read ({type(error).__name__})", metadata
