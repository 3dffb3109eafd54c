"""`ip2p evaluate`: scores editors on a data set, as a job that can be killed, resumed and distributed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ip2p import __version__
from ip2p.base import jobs
from ip2p.base.errors import InputError
from ip2p.base.files import content_key, make_folder, replacing, write_text
from ip2p.base.terminal import say
from ip2p.data.loading import open_source
from ip2p.evaluation.encoders import ENCODERS, find_encoder
from ip2p.evaluation.judge import JUDGED, PROMPTS, JudgeSettings, count_failures
from ip2p.evaluation.metrics import EXACT, METRICS, USUAL, Metric, chosen_metrics
from ip2p.evaluation.rows import PairRows, RowSource, StorybookRows
from ip2p.evaluation.settings import SAMPLING, STRENGTHS, EvaluateConfig, named_model, sweep_values
from ip2p.evaluation.stage import PICTURES, ROWS, EvalPart, EvaluateStage, Variant
from ip2p.models.bundle import called, find_model
from ip2p.settings import Split, run_json
from ip2p.synth.server import server_key
from ip2p.synth.workers import worker_options

if TYPE_CHECKING:
    import pyarrow as pa
    from typing_extensions import Unpack

    from ip2p.evaluation.arguments import EvaluateArguments

STORYBOOK = "storybook"
JOB = "edits"  # subfolder of the report
REPORT, TABLE, PAGE, RUN = "report.json", "rows.parquet", "index.html", "run.json"
STORYBOOK_ROWS, STORYBOOK_SIDE = 200, 64
PART_ROWS, PARTS = 16, 8  # maximum rows of a part; minimum parts of a small job, for several workers
COPY, TRUTH = "copy the input", "ground truth"
CURVES = (("clip_directional", "clip_image"), ("strict", "clip_image"), ("clip_directional", "strict"))
# The released script: 100 steps at 512 pixels, one text scale, CLIP alone.
AS_CODE = {
    "steps": 100,
    "text_cfg": 7.5,
    "size": 512,
    "sampler": "euler_ancestral",
    "schedule": "linspace",
    "cfg_interval": (0.0, 1.0),
}
AS_CODE_METRICS = ("clip_directional", "clip_image", "clip_text")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The metrics and how they are averaged. It has only names, so that it can be sent to workers.

    benchmark: whose published metrics can be named as well. by_kind: average the means of the kinds of edits.
    """

    metrics: tuple[str, ...]
    benchmark: str | None = None
    by_kind: bool = False
    judged: bool = False

    def __call__(self) -> dict[str, Metric]:
        known = METRICS
        if self.benchmark is not None:
            from ip2p.evaluation.benchmarks import BENCHMARKS

            known = known | BENCHMARKS[self.benchmark].published
        return chosen_metrics(self.metrics, known) | (JUDGED if self.judged else {})


def evaluate(config: EvaluateConfig | None = None, **changes: Unpack[EvaluateArguments]) -> dict[str, Any]:
    """Score editors on a data set, write the report, and return the content of `report.json`.

    config, changes: the settings, see `EvaluateConfig`; the same call resumes.

    `evaluate(data="pairs", model=["editor"], out="report")`. Raises InputError, ModelError and ResourceError.
    """
    config = (config or EvaluateConfig()).changed(**changes)
    config.check()
    assert config.out is not None, "EvaluateConfig.check was called"
    folder = Path(config.out)
    make_folder(folder)
    source, protocol = open_rows(config)
    judge = find_judge(config)
    names = encoder_names(config)
    metrics = protocol()
    variants = find_variants(config, source)
    size = max(1, min(PART_ROWS, -(-len(source) // PARTS)))
    parts = [
        EvalPart(variant=variant, rows=range(start, min(start + size, len(source))))
        for variant in variants
        for start in range(0, len(source), size)
    ]
    stage = partial(EvaluateStage, source, protocol, config, names=names, judge=judge)
    weights = {model: find_model(model) for v in variants if (model := v.model) is not None}
    slots = dict.fromkeys(slot for metric in metrics.values() for slot in metric.slots)
    # Before any work, so that a missing model is reported immediately.
    encoders = {slot: find_encoder(slot, names.get(slot)) for slot in slots}
    settings = {
        "data": source.key,
        "rows": len(source),
        "variants": [asdict(variant) for variant in variants],
        "metrics": list(metrics),
        "as published": config.as_published,
        "as code": config.as_code,
        "seed": config.seed,
        "dtype": config.dtype,
        "models": {name: content_key(path) for name, path in weights.items()},
        "encoders": {slot: content_key(path) for slot, path in encoders.items()},
        "shown": min(config.shown, len(source)),
        "judge": None if judge is None else judge.as_json(),
    }
    summary = jobs.run_job(
        stage,
        parts,
        folder / JOB,
        settings=settings,
        unit="edits",
        overwrite=config.overwrite,
        **worker_options(config, max(weights.values(), key=_size, default=None), device=config.device),
    )
    write_text(folder / RUN, run_json(config))
    if flawed := summary.counts.get("flawed"):
        say(f"{flawed:,.0f} edits were skipped; the column flaw of {folder / TABLE} has the reasons")
    return write_report(config, folder, source, metrics, names, by_kind=protocol.by_kind)


def open_rows(config: EvaluateConfig) -> tuple[RowSource, Protocol]:
    """The rows to edit and the metrics. Raises InputError."""
    drawn = config.data == STORYBOOK and not Path(STORYBOOK).exists()
    if config.columns and (config.benchmark is not None or drawn):
        raise InputError(
            f"--columns is for data sets of pairs, not for {config.benchmark or STORYBOOK}; remove it."
        )
    if config.benchmark is not None:
        from ip2p.evaluation.benchmarks import open_benchmark

        return open_benchmark(config)
    if drawn:
        if config.split not in get_args(Split):
            raise InputError(
                f"the storybook has no split {config.split!r}; choose one of: {', '.join(get_args(Split))}."
            )
        side = config.size or STORYBOOK_SIDE
        if not isinstance(side, int):
            raise InputError("storybook pages are square; use a single number, for example --size 64.")
        source: RowSource = StorybookRows(
            config.count or STORYBOOK_ROWS, size=side, seed=config.seed, split=config.split
        )
        usual: tuple[str, ...] = (*EXACT, *USUAL)
    else:
        pairs = open_source(
            config.data,
            stream=config.stream,
            revision=config.revision,
            split=config.split,
            columns=config.columns,
        )
        source, usual = PairRows(pairs, config.count), USUAL
    chosen = AS_CODE_METRICS if config.as_code else config.metric_names
    return source, Protocol(metrics=chosen or usual, judged=config.judge is not None)


def find_judge(config: EvaluateConfig) -> JudgeSettings | None:
    """The judge, or None. Raises InputError for a benchmark that needs one."""
    imgedit = config.benchmark == "imgedit"
    if config.judge is None:
        if config.benchmark in ("gedit", "imgedit"):
            raise InputError(f"{config.benchmark} is scored by a judge; add --judge URL --judge-model NAME.")
        return None
    usual = Path(config.data) / "prompts.json" if imgedit else PROMPTS
    return JudgeSettings(
        server=config.judge,
        model=config.judge_model,
        repeats=config.judge_repeats,
        timeout=config.judge_timeout,
        prompts=config.judge_prompts or usual,
        style="imgedit" if imgedit else "viescore",
        published=config.as_published,
        key=server_key(config.key_variable),
    )


def encoder_names(config: EvaluateConfig) -> dict[str, str]:
    """The encoders that replace the pinned ones, by slot."""
    named = {slot: getattr(config, slot) for slot in ENCODERS if getattr(config, slot) is not None}
    if config.data == STORYBOOK and config.benchmark is None:
        named.setdefault("clip", STORYBOOK)
    return named


def find_variants(config: EvaluateConfig, source: RowSource) -> list[Variant]:
    """What produces outputs: the two references, the models, and the baselines."""
    sampling = {name: getattr(config, name) for name in SAMPLING if getattr(config, name) is not None}
    if config.as_code:
        sampling = AS_CODE | sampling
    variants = [
        Variant(name=COPY, kind="copy", settings={}),
        Variant(name=TRUTH, kind="truth", settings={}),
    ]
    name, values = sweep_values(config.sweep) if config.sweep else ("", (None,))
    for text in config.model:
        label, model = named_model(text)
        for value in values:
            swept = {} if value is None else {name: int(value) if name == "steps" else value}
            variants.append(
                Variant(name=label, kind="model", model=model, settings=sampling | swept, point=value)
            )
    base = config.base or (named_model(config.model[0])[1] if config.model else None)
    for kind in dict.fromkeys(config.baseline):
        label = f"{'SDEdit' if kind == 'sdedit' else 'caption alone'}, {called(str(base))}"
        for strength in STRENGTHS if kind == "sdedit" else (None,):
            settings = sampling | ({} if strength is None else {"strength": strength})
            variants.append(Variant(name=label, kind=kind, model=base, settings=settings, point=strength))
    return variants


def write_report(
    config: EvaluateConfig,
    folder: Path,
    source: RowSource,
    metrics: dict[str, Metric],
    names: Mapping[str, str],
    *,
    by_kind: bool = False,
) -> dict[str, Any]:
    """Write the report of a finished job: JSON, the table of all rows, curves and the page."""
    import pyarrow.parquet as pq

    from ip2p.evaluation.curves import draw_curves
    from ip2p.evaluation.report import page_html, write_summary

    rows = _joined(folder / JOB, ROWS)
    lines = write_summary(rows, metrics, resamples=config.resamples, by_kind=by_kind)
    # Without any targets, there is no ground truth to show.
    lines = [line for line in lines if line["rows"] or line["kind"] != "truth"]
    metrics = {
        name: metric
        for name, metric in metrics.items()
        if metric.hidden or any(line["metrics"][name] is not None for line in lines)
    }
    judged: dict[str, Any] | None = None
    if config.judge is not None:
        judged = {"model": config.judge_model, "repeats": config.judge_repeats}
        records = rows.to_pylist()
        for line in lines:
            line["judge"] = count_failures(
                [row for row in records if (row["variant"], row["point"]) == (line["name"], line["point"])]
            )
        judged |= count_failures(records)
    report: dict[str, Any] = {
        "ip2p": __version__,
        "data": source.name,
        "key": source.key,
        "benchmark": config.benchmark,
        "protocol": "as published" if config.as_published else "as code" if config.as_code else "corrected",
        "rows": len(source),
        "seed": config.seed,
        "metrics": {
            name: {"about": metric.about, "higher": metric.higher, "encoders": _encoders(metric, names)}
            for name, metric in metrics.items()
            if not metric.hidden
        },
        "judge": judged,
        "lines": lines,
    }
    with replacing(folder / TABLE) as temporary:
        pq.write_table(rows, temporary)
    curves = []
    if config.sweep or config.baseline or len(config.model) > 1:
        curves = [
            svg
            for x, y in CURVES
            if x in metrics and y in metrics
            if (svg := draw_curves(lines, x, y, folder))
        ]
    write_text(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    pictures = _joined(folder / JOB, PICTURES).to_pylist()
    first = [row for row in rows.to_pylist() if row["row"] < config.shown]
    title = f"{config.benchmark or called(source.name)}: {len(source):,} edits"
    notes = [f"Protocol: {report['protocol']}. Seed {config.seed}."]
    if judged is not None:
        failures = (
            ", ".join(f"{count} {reason}" for reason, count in judged["failures"].items() if count) or "none"
        )
        notes.append(
            f"Judge: {judged['model']}, {judged['replies']:,} questions on {', '.join(judged['dates'])}; "
            f"replies without a score: {failures}."
        )
    write_text(folder / PAGE, page_html(title, lines, metrics, first, pictures, notes=notes, curves=curves))
    return report


def _encoders(metric: Metric, names: Mapping[str, str]) -> list[str]:
    return [
        called(names[slot]) if slot in names else f"{ENCODERS[slot].name}@{ENCODERS[slot].revision or 'main'}"
        for slot in metric.slots
    ]


def _joined(folder: Path, table: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.read_table(path) for path in jobs.committed(folder, table)])


def _size(path: Path) -> int:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
