"""The settings of `ip2p evaluate`; those of an edit are taken from `EditSettings`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import create_model

from ip2p.base.errors import InputError
from ip2p.settings import (
    COMMON,
    GUIDANCE,
    MAX_SEED,
    MODEL,
    ColumnSettings,
    Conflict,
    DeviceSettings,
    DTypeSettings,
    EditSettings,
    HubDataSettings,
    OverwriteSettings,
    RunSettings,
    Settings,
    Texts,
    WorkerSettings,
    check_needed,
    meta_of,
    numeric_settings,
    setting,
)

BenchmarkName = Literal["magicbrush", "magicbrush-multi", "emu-edit", "pie", "gedit", "imgedit"]
BaselineName = Literal["sdedit", "text"]
MEASURES, BASELINES, JUDGE = "Metrics", "Baselines", "Judge"
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# The settings of an edit that do not belong to one picture.
SAMPLING = tuple(
    name
    for name, found in EditSettings.model_fields.items()
    if meta_of(found).group in (COMMON, GUIDANCE) and name not in ("instruction", "seed")
)
MAX_POINTS = 100

_fields: dict[str, Any] = {
    name: (EditSettings.model_fields[name].annotation, copy.copy(EditSettings.model_fields[name]))
    for name in SAMPLING
}
SamplingSettings: Any = create_model("SamplingSettings", __base__=Settings, **_fields)


class EvaluateConfig(
    RunSettings,
    OverwriteSettings,
    HubDataSettings,
    ColumnSettings,
    WorkerSettings,
    DTypeSettings,
    DeviceSettings,
    SamplingSettings,  # type: ignore[misc]
):
    """Score editors on a data set: ip2p evaluate pairs --model editor --model storybook -o report"""

    data: str = setting(
        "",
        "a data set of pairs (docs/data.md), a benchmark's files, or storybook",
        positional=1,
        metavar="DATA",
    )
    out: Path | None = setting(None, "output folder; the same command resumes", group=COMMON, flags=("-o",))
    model: Texts = setting(
        (),
        "an editor, or NAME=EDITOR; may be repeated; default: only the baselines",
        group=COMMON,
        metavar="MODEL",
    )
    count: int | None = setting(
        None,
        "use only the first N rows; default: all, or 200 for storybook",
        ge=1,
        le=10**9,
        example=200,
        group=COMMON,
    )
    metrics: Texts = setting(
        (),
        "metrics, separated by commas; may be repeated; see --list; default: depends on the data",
        group=MEASURES,
        metavar="NAME",
    )
    list_metrics: bool = setting(False, "list all metrics and exit", group=MEASURES, name="list")
    sweep: str | None = setting(
        None,
        "score each model at several values of a setting and draw curves",
        group=COMMON,
        metavar="NAME=FROM:TO:STEP",
        example="image_cfg=1.0:2.2:0.2",
    )
    baseline: tuple[BaselineName, ...] = setting(
        (),
        "sdedit: the edited caption at strengths 0.3 to 0.9; text: the edited caption alone; may be repeated",
        group=BASELINES,
        metavar="NAME",
    )
    base: str | None = setting(
        None, "model of the baselines; default: the first --model", group=BASELINES, metavar="MODEL"
    )
    split: str = setting("test", "split of the data set", group="Data", metavar="NAME")
    seed: int = setting(
        0,
        "seed; the noise of a row depends on it and on the row's id",
        ge=0,
        le=MAX_SEED,
        example=7,
        group=COMMON,
    )
    clip: str | None = setting(
        None,
        "CLIP for the clip_* metrics; default: ViT-L/14, or the storybook's for its pages",
        group=MEASURES,
        metavar="MODEL",
    )
    clip_b32: str | None = setting(None, "another CLIP for clip_b32_*", group=MEASURES, hidden=True)
    dino: str | None = setting(None, "another DINO for dino_*", group=MEASURES, hidden=True)
    dinov2: str | None = setting(None, "another DINOv2 for dinov2_*", group=MEASURES, hidden=True)
    structure: str | None = setting(None, "another ViT for structure", group=MEASURES, hidden=True)
    benchmark: BenchmarkName | None = setting(
        None, "the benchmark that DATA is", group="Data", metavar="NAME"
    )
    as_published: bool = setting(
        False,
        "evaluate as the benchmark's public code does, faults included (docs/evaluate.md)",
        group=MEASURES,
    )
    as_code: bool = setting(
        False,
        "evaluate as the paper's released script does, faults included (docs/evaluate.md)",
        group=MEASURES,
    )
    judge: str | None = setting(
        None, "OpenAI-compatible server whose vision model scores the edits", group=JUDGE, metavar="URL"
    )
    judge_model: str = setting("", "name of the vision model on the server", group=JUDGE, metavar="NAME")
    judge_repeats: int = setting(
        1, "answers per picture, to estimate the variance", ge=1, le=100, group=JUDGE, hidden=True
    )
    judge_prompts: Path | None = setting(
        None, "folder with your own semantics.txt and quality.txt", group=JUDGE, hidden=True
    )
    judge_timeout: float = setting(
        120.0, "seconds to wait for an answer", gt=0, le=3600, group=JUDGE, hidden=True, same_job=False
    )
    key_variable: str | None = setting(
        None,
        "environment variable with the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY",
        group=JUDGE,
        hidden=True,
        same_job=False,
    )
    batch_size: int | None = setting(
        None,
        "edits per batch; default: 16 for small pictures, else 4, or 1 on a CPU",
        ge=1,
        le=4096,
        example=4,
        group=MODEL,
    )
    shown: int = setting(
        24, "number of rows whose pictures the page shows", ge=0, le=10_000, group="Report", hidden=True
    )
    resamples: int = setting(
        2000, "bootstrap resamples for the intervals", ge=100, le=100_000, group="Report", hidden=True
    )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The individual names in `metrics`."""
        return tuple(name for text in self.metrics for name in text.split(",") if name)

    def check_together(self) -> None:
        super().check_together()
        if self.sweep is not None:
            sweep_values(self.sweep)
        if self.as_published and self.benchmark is None:
            raise Conflict("{as_published} needs {benchmark}.", field="as_published")
        if self.as_code and (self.benchmark is not None or self.metrics):
            raise Conflict(
                "{as_code} has its own metrics; remove {metrics} and {benchmark}.", field="as_code"
            )
        if (self.judge is None) == bool(self.judge_model):
            raise Conflict("{judge} and {judge_model} go together; set both.", field="judge")
        if self.baseline and not (self.base or self.model):
            raise Conflict("{baseline} needs {base} or {model}.", field="baseline")

    def check(self) -> None:
        """Raise InputError for missing or inconsistent settings."""
        if self.list_metrics:
            return
        example = "ip2p evaluate storybook --model storybook -o report"
        check_needed(self, ("data", "the data set is"), ("out", "-o is"), example=example)
        if not (self.model or self.baseline or self.base):
            return
        names = [named_model(text)[0] for text in self.model]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"two models are called {name}; choose other names: --model A={name} --model B=…"
                )


def named_model(text: str) -> tuple[str, str]:
    """The name and the model in NAME=MODEL; the default name is the last part of the model's path."""
    from ip2p.models.bundle import called

    name, equals, model = text.partition("=")
    if equals and not Path(text).exists():
        return name, model
    return called(text), text


def sweep_values(text: str) -> tuple[str, tuple[float, ...]]:
    """image_cfg=1.0:2.2:0.2 (both ends included) or steps=5,10,20 as a setting and its values.

    Raises Conflict for another setting, or for no values.
    """
    name, _, values = text.partition("=")
    name = EditSettings.field_names().get(name.replace("-", "_"), name)
    known = [each for each in numeric_settings() if each in SAMPLING]
    if name not in known:
        raise Conflict(
            f"{{sweep}} does not support {name!r}; choose one of: {', '.join(known)}.", field="sweep"
        )
    try:
        if re.fullmatch(r"[^:,]+:[^:,]+:[^:,]+", values):
            low, high, step = (float(each) for each in values.split(":"))
            count = int((high - low) / step + 1e-6) + 1
            found = [round(low + k * step, 10) for k in range(min(count, MAX_POINTS + 1))]
        else:
            found = [float(each) for each in values.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not 1 <= len(found) <= MAX_POINTS:
        raise Conflict(
            f"{{sweep}} {text!r} has no values, or more than {MAX_POINTS}; write image_cfg=1.0:2.2:0.2 or "
            "steps=5,10,20.",
            field="sweep",
        )
    for value in found:
        EditSettings.read({name: value})  # within its range
    return name, tuple(found)
