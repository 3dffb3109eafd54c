"""MagicBrush's test set (Zhang et al. 2023): edit_sessions.json, local_descriptions.json and images/.

Single-turn edits start from the previous turn's *target*. Multi-turn edits are chained, and the last result
is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.evaluation.benchmarks.files import picture_at, read_object
from ip2p.evaluation.encoders import Encoders
from ip2p.evaluation.metrics import Metric, Shot, text_similarity
from ip2p.evaluation.rows import EvalRow, region_of

METRICS = ("l1", "l2", "clip_b32_target", "clip_b32_text", "dino_target", "l1_outside")


@dataclass(frozen=True)
class BrushSession:
    """One or more turns, from `before` to `after`; caption: the local caption of `after`."""

    id: str
    group: str
    before: Path
    after: Path
    turns: tuple[str, ...]
    caption: str
    mask: Path | None


def read_turns(folder: Path, published: bool) -> list[BrushSession]:
    """Every turn as a single edit."""
    return [one for turns in _sessions(folder) for one in turns]


def read_sessions(folder: Path, published: bool) -> list[BrushSession]:
    """Each session as one chain of edits, without a mask, since the turns have different ones."""
    chains = ((turns[0], turns[-1], tuple(one.turns[0] for one in turns)) for turns in _sessions(folder))
    return [replace(last, id=last.group, before=a.before, turns=t, mask=None) for a, last, t in chains]


def _sessions(folder: Path) -> list[list[BrushSession]]:
    captions = read_object(folder, "local_descriptions.json", "local_captions.json")

    def one(name: str, number: int, turn: dict[str, str]) -> BrushSession:
        before, after, mask = (folder / "images" / name / turn[part] for part in ("input", "output", "mask"))
        caption = captions.get(name, {}).get(turn["output"], "")
        return BrushSession(f"{name}-{number}", name, before, after, (turn["instruction"],), caption, mask)

    sessions = read_object(folder, "edit_sessions.json").items()
    return [[one(name, k, turn) for k, turn in enumerate(turns, 1)] for name, turns in sessions if turns]


def make_magicbrush_row(one: BrushSession) -> EvalRow:
    before, after = picture_at(one.before, one.id), picture_at(one.after, one.id)
    data = one.mask.read_bytes() if one.mask is not None and one.mask.is_file() else None
    mask = None if data is None else region_of(data, before.size, one.id)
    known: dict[str, Any] = {"turns": one.turns, "edited_caption": one.caption, "group": one.group}
    return EvalRow(id=one.id, before=before, after=after, mask=mask, **known)


def published_clip_t(shot: Shot, encoders: Encoders) -> float:
    """CLIP-T of the public evaluator, which fails for a text of more than 77 tokens."""
    tokens = len(encoders.model("clip_b32").tokenizer(shot.edited_caption)["input_ids"])
    if tokens > 77:
        raise InputError(
            f"a caption has {tokens} tokens, but MagicBrush's evaluator fails at more than 77: "
            f"{shot.edited_caption[:60]!r}. Without --as-published, longer captions are truncated."
        )
    return text_similarity(shot, encoders, "clip_b32")


_CLIP_T = Metric(measure=published_clip_t, higher=True, slots=("clip_b32",), about="CLIP-T as published")
PUBLISHED = {"magicbrush_clip_t": _CLIP_T}
PUBLISHED_METRICS = ("l1", "l2", "clip_b32_target", "dino_target", *PUBLISHED)
