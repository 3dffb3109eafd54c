"""PIE-Bench (Ju et al. 2024): mapping_file.json with run-length encoded masks, and annotation_images/."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip2p.evaluation import metrics
from ip2p.evaluation.benchmarks.files import decoded_mask, picture_at, read_object
from ip2p.evaluation.encoders import Encoders
from ip2p.evaluation.metrics import Metric, Shot, structure_distance
from ip2p.evaluation.rows import EvalRow

METRICS = (
    *("structure", "psnr_outside", "l2_outside", "ssim_outside"),
    *("clip_text", "clip_directional", "clip_image"),
)


@dataclass(frozen=True)
class PieEdit:
    """An entry of the mapping file. border: add a border to the mask, as the public evaluator does."""

    id: str
    picture: Path
    entry: dict[str, Any]
    border: bool


def read_mapping(folder: Path, published: bool) -> list[PieEdit]:
    """The entries of the mapping file."""
    mapping, home = read_object(folder, "mapping_file.json"), folder / "annotation_images"
    return [PieEdit(id, home / entry["image_path"], entry, published) for id, entry in mapping.items()]


def make_pie_row(edit: PieEdit) -> EvalRow:
    before, entry = picture_at(edit.picture, edit.id), edit.entry
    marked = (entry["original_prompt"], entry["editing_prompt"])
    caption, edited = (text.replace("[", "").replace("]", "") for text in marked)
    mask = decoded_mask(entry["mask"], before.height, before.width, border=edit.border)
    known = {
        "caption": caption,
        "edited_caption": edited,
        "mask": mask,
        "kind": str(entry["editing_type_id"]),
    }
    return EvalRow(id=edit.id, before=before, turns=(entry["editing_instruction"],), **known)


def _structure(shot: Shot, encoders: Encoders) -> float:
    return structure_distance(shot.before, shot.output, encoders, levels=255.0)


def _blacked(name: str) -> Metric:
    """A metric over *all* pixels, with the masked region black in both pictures; NaN if it is everything."""

    def measure(shot: Shot, encoders: Encoders) -> float:
        if shot.mask is None or bool(shot.mask.all()):
            return math.nan
        both = (picture * ~shot.mask for picture in (shot.before, shot.output))
        return float(getattr(metrics, name)(*both))

    about = f"{name} with the edited region black, over the whole picture"
    return Metric(measure=measure, higher=name != "l2", needs=("mask",), about=about)


_FED = Metric(
    measure=_structure, higher=False, slots=("structure",), about="structure distance, fed 0 to 255"
)
PUBLISHED = {"pie_structure": _FED, **{f"pie_{name}": _blacked(name) for name in ("psnr", "l2", "ssim")}}
