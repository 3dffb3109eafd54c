"""The job stage of `ip2p evaluate`: edits rows with one variant and measures the results."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from ip2p.base.devices import pick_device
from ip2p.base.errors import InputError
from ip2p.base.jobs import StageOutput
from ip2p.data.records import BrokenRow
from ip2p.evaluation.encoders import Encoders
from ip2p.evaluation.judge import JudgeSettings, VisionJudge
from ip2p.evaluation.metrics import Metric, Shot, measure_shots
from ip2p.evaluation.rows import EvalRow, RowSource, as_picture
from ip2p.evaluation.settings import EvaluateConfig
from ip2p.evaluation.storybook import edit_tensors
from ip2p.pictures.images import to_pil
from ip2p.settings import EditSettings
from ip2p.synth.records import derived_seed

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor
    from ip2p.evaluation.baselines import CaptionPainter

ROWS, PICTURES = "rows/rows", "pictures/pictures"  # tables of the job
THUMBNAIL = 160  # pixels
SMALL_SIDE, SMALL_BATCH = 256, 16  # batch size for pictures up to this side
Kind = Literal["copy", "truth", "model", "sdedit", "text"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A line of the report: what produces the outputs. point: the swept value, or SDEdit's strength."""

    name: str
    kind: Kind
    model: str | None = None
    settings: Mapping[str, Any]
    point: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalPart:
    """Some rows of one variant."""

    variant: Variant
    rows: range

    def __len__(self) -> int:
        return len(self.rows)


class EvaluateStage:
    """Edits and measures. One model is loaded at a time; encoders stay loaded.

    metrics: returns the metrics by name. names: encoders that replace the pinned ones. judge: scores every
    result. With `config.as_code`, pictures are resized to a square and not clipped, as in the paper's script.
    Pictures of the first `config.shown` rows are kept.
    """

    def __init__(
        self,
        source: RowSource,
        metrics: Callable[[], Mapping[str, Metric]],
        config: EvaluateConfig,
        *,
        names: Mapping[str, str],
        judge: JudgeSettings | None = None,
    ) -> None:
        self.source, self.metrics, self.config = source, dict(metrics()), config
        self.judge = None if judge is None else VisionJudge(judge)
        self.encoders = Encoders(names, device=pick_device(config.device), signed=config.as_code)
        self._loaded: tuple[tuple[str, bool], Any] | None = None

    def __call__(self, part: EvalPart) -> StageOutput:
        import pyarrow as pa

        variant = part.variant
        kept: list[tuple[int, EvalRow]] = []
        cells: dict[int, dict[str, Any]] = {}
        for number in part.rows:
            known = {"row": number, "variant": variant.name, "kind": variant.kind, "point": variant.point}
            known |= {"settings": json.dumps(dict(variant.settings))}
            try:
                row = self.source[number]
            except BrokenRow as error:
                cells[number] = known | {"id": error.id, "flaw": error.reason}
                continue
            known |= {"id": row.id, "group": row.group or row.id, "edit_kind": row.kind}
            cells[number] = known | {"instruction": " / ".join(row.turns), "seed": self._seed(row)}
            if variant.kind == "truth" and row.after is None:
                cells[number]["flaw"] = "there is no target"
            elif variant.kind in ("sdedit", "text") and not row.edited_caption.strip():
                cells[number]["flaw"] = "there is no edited caption"
            else:
                kept.append((number, row))
        shots = self._shots(variant, [row for _, row in kept])
        pictures = []
        judged: Sequence[Mapping[str, Any]] = [{}] * len(shots) if self.judge is None else self.judge(shots)
        counts: Counter[str] = Counter(edits=len(kept), flawed=len(part) - len(kept))
        measured = measure_shots(shots, self.metrics, self.encoders)
        for (number, row), shot, found, scores in zip(kept, shots, measured, judged, strict=True):
            cells[number] |= {
                name: None if value != value else value for name, value in {**found, **scores}.items()
            }
            if number < self.config.shown:
                pictures.append(_pictures(number, variant, row, shot))
        self.encoders.forget()
        columns = [(name, pa.float64()) for name in self.metrics]
        if self.judge is not None:
            columns += [("judge_replies", pa.int64()), ("judge_failures", pa.string())]
            columns += [("judge_date", pa.string())]
        rows = pa.Table.from_pylist([cells[k] for k in part.rows], pa.schema([*_known(), *columns]))
        return StageOutput(
            tables={ROWS: rows, PICTURES: pa.Table.from_pylist(pictures, pa.schema(_shown()))}, counts=counts
        )

    def _seed(self, row: EvalRow) -> int:
        return derived_seed("evaluate", self.config.seed, row.id)

    def _shots(self, variant: Variant, rows: Sequence[EvalRow]) -> list[Shot]:
        if self.config.as_code and variant.kind == "model":
            inputs, outputs = self._as_code(variant, rows)
        else:
            inputs = [as_picture(row.before) for row in rows]
            outputs = [as_picture(picture) for picture in self.outputs(variant, rows)]
        return [
            Shot(
                before=before,
                output=output,
                instruction=" ".join(row.turns),
                target=None if row.after is None else as_picture(row.after),
                mask=row.mask,
                caption=row.caption,
                edited_caption=row.edited_caption,
                case=row.case,
                kind=row.kind,
            )
            for row, before, output in zip(rows, inputs, outputs, strict=True)
        ]

    def outputs(self, variant: Variant, rows: Sequence[EvalRow]) -> list[Image.Image]:
        """The results of a variant for some rows, each at its input's size."""
        if variant.kind == "copy":
            return [row.before for row in rows]
        if variant.kind == "truth":
            return [row.after for row in rows if row.after is not None]
        settings = EditSettings.read({k: v for k, v in variant.settings.items() if k != "strength"})
        seeds = [self._seed(row) for row in rows]
        model: Any = self._model(variant)
        current = [row.before for row in rows]
        if variant.kind != "model":
            return model.draw(  # type: ignore[no-any-return]
                current,
                [row.edited_caption for row in rows],
                seeds=seeds,
                settings=settings,
                strength=variant.settings.get("strength"),
                batch_size=self._batch(model.editor, current),
            )
        for turn in range(max((len(row.turns) for row in rows), default=0)):
            some = [k for k, row in enumerate(rows) if turn < len(row.turns)]
            results = model.edit_batch(
                [current[k] for k in some],
                [rows[k].turns[turn] for k in some],
                seeds=[seeds[k] for k in some],
                settings=settings,
                batch_size=self._batch(model, current),
            )
            for k, result in zip(some, results, strict=True):
                current[k] = result
        return current

    def _as_code(
        self, variant: Variant, rows: Sequence[EvalRow]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        editor: Any = self._model(variant)
        settings = EditSettings.read(variant.settings)
        side = settings.size if isinstance(settings.size, int) else editor.bundle.card.native_size
        inputs = [as_picture(row.before.resize((side, side), Image.Resampling.LANCZOS)) for row in rows]
        if any(len(row.turns) > 1 for row in rows):
            raise InputError("--as-code supports one edit per row, but the data has rows with several turns.")
        outputs: list[torch.Tensor] = []
        batch = self._batch(editor, [row.before for row in rows])
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            found = edit_tensors(
                editor,
                torch.stack(inputs[start : start + batch]) * 2 - 1,
                [row.turns[0] for row in some],
                seeds=[self._seed(row) for row in some],
                settings=settings,
            )
            outputs += list((found.float().cpu() + 1) / 2)
        return inputs, outputs

    def _batch(self, editor: Editor, pictures: Sequence[Image.Image]) -> int:
        # A larger batch makes small pictures faster on a CPU. Parts are fixed, so results are reproducible.
        small = all(max(picture.size) <= SMALL_SIDE for picture in pictures)
        return self.config.batch_size or (SMALL_BATCH if small else editor.batch_size)

    def _model(self, variant: Variant) -> Editor | CaptionPainter:
        key = str(variant.model), variant.kind == "model"
        if self._loaded is None or self._loaded[0] != key:
            from ip2p.editing.editor import Editor
            from ip2p.evaluation.baselines import CaptionPainter

            self._loaded = None  # free it first: two models may not fit
            load: Any = Editor.load if variant.kind == "model" else CaptionPainter
            self._loaded = key, load(variant.model, device=self.config.device, dtype=self.config.dtype)
        return self._loaded[1]  # type: ignore[no-any-return]


def _known() -> list[tuple[str, Any]]:
    import pyarrow as pa

    texts = ("variant", "kind", "id", "group", "edit_kind", "instruction", "settings", "flaw")
    return [
        ("row", pa.int64()),
        ("point", pa.float64()),
        ("seed", pa.int64()),
        *((name, pa.string()) for name in texts),
    ]


def _shown() -> list[tuple[str, Any]]:
    import pyarrow as pa

    return [
        ("row", pa.int64()),
        ("variant", pa.string()),
        ("point", pa.float64()),
        ("before", pa.binary()),
        ("output", pa.binary()),
    ]


def _pictures(number: int, variant: Variant, row: EvalRow, shot: Shot) -> dict[str, Any]:
    return {
        "row": number,
        "variant": variant.name,
        "point": variant.point,
        "before": _thumbnail(row.before) if variant.kind == "copy" else None,
        "output": _thumbnail(to_pil(shot.output * 2 - 1)),
    }


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return file.getvalue()
