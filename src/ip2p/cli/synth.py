"""`ip2p synth`: from captions to a filtered set of pairs.

Each verb is a job in a folder (`jobs`). The same command resumes it; settings that affect the result must not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ip2p.base import jobs
from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import check_output, content_key, make_folder, write_text
from ip2p.base.terminal import say
from ip2p.data.loading import open_source
from ip2p.data.records import Source
from ip2p.editing.rank import CLIP_MODEL, find_clip
from ip2p.models.bundle import called, find_model, packaged_models
from ip2p.models.load import read_json
from ip2p.settings import Settings, run_json
from ip2p.synth.captions import BLOCK_LIST, Rules, read_block_list, read_captions
from ip2p.synth.filter import (
    PRESETS,
    SCORES_FOLDER,
    STORYBOOK,
    Scored,
    Thresholds,
    clips_of,
    filter_pairs,
    known_scores,
    preset_for,
    read_scores,
)
from ip2p.synth.inspect import inspect as write_page
from ip2p.synth.instruct import EditLimits, LocalWriter, Writer, find_lm
from ip2p.synth.records import SCALE, TABLE, Triple, read_triples, write_triples
from ip2p.synth.safety import Classifier
from ip2p.synth.server import ServerWriter, Usage, server_key
from ip2p.synth.settings import (
    KeepBestSettings,
    SynthFilterConfig,
    SynthInspectConfig,
    SynthInstructConfig,
    SynthPairsConfig,
    SynthTuneConfig,
)
from ip2p.synth.stages import REFUSED, REJECTED, InstructStage, PairStage
from ip2p.synth.tune import tune_lm
from ip2p.synth.workers import worker_options

RUN = "run.json"
CAPTIONS_A_PART = 8, 64  # minimum and maximum
PARTS = 16  # of a small job: shows progress, and a kill costs little
TRIPLES_A_PART = 8
STORYBOOK_SCALE = (3.0, 5.0)  # around its recommended scale, 4
# The files of a painter; its folder may also contain a CLIP and a language model.
PAINTER_FILES = ("unet/*", "vae/*", "text_encoder*/*", "tokenizer*/*", "scheduler/*", "model_index.json")
EVERY = Thresholds(image=-2, caption=-2, directional=-2)  # every pair passes
SAMPLING = ("shots", "temperature", "frequency_penalty", "max_tokens")  # settings of every writer


# --- captions to triples --------------------------------------------------------------------------


def run_instruct(config: SynthInstructConfig) -> None:
    """Write edits of captions; the path of the triples goes to stdout.

    Raises InputError also if no answer was accepted.
    """
    assert config.out is not None, "SynthInstructConfig.check was called"
    out = config.out
    file = out if out.suffix == ".parquet" else None
    folder = out.with_suffix(".parts") if file else out
    if file and not jobs.is_job(folder):
        check_output(file, overwrite=config.overwrite)
    block = BLOCK_LIST if config.block_list is None else read_block_list(config.block_list)
    read = read_captions(
        config.captions,
        column=config.column,
        rules=Rules(
            min_words=config.min_words,
            max_words=config.max_words,
            min_score=config.min_score,
            language=config.language,
            block=block,
        ),
        sample=config.sample,
        seed=config.seed,
        split=config.split,
        revision=config.revision,
        stream=config.stream,
    )
    for line in read.lines():
        say(line)
    texts = [caption.text for caption in read.captions]
    limits = EditLimits(block=block, spatial=not config.allow_spatial)
    named = ("model", "edits", "retries", "allow_spatial", *SAMPLING)
    settings = {name: getattr(config, name) for name in named}
    settings |= {"content of the captions": _hash(texts), "content of --block-list": _hash(block)}
    if config.server is None:
        settings |= {"dtype": config.dtype, "content of --model": content_key(find_lm(config.model))}
    else:
        settings["way"] = config.way  # the server may come back at another address
    size = part_size(len(texts))
    workers = worker_options(
        config, None if config.server is not None else find_lm(config.model), device=config.device
    )
    if file and config.overwrite:
        file.unlink(missing_ok=True)  # its parts are deleted too, so a stale file must not remain
    summary = jobs.run_job(
        partial(InstructStage, _writer(config), edits=config.edits, retries=config.retries, limits=limits),
        [texts[start : start + size] for start in range(0, len(texts), size)],
        folder,
        settings=settings,
        unit="captions",
        **workers,
        overwrite=config.overwrite,
    )
    _write_run(folder, config, summary)
    for line in _instruct_lines(config, summary):
        say(line)
    if not summary.rows[TABLE]:
        raise InputError(
            f"no answer was taken of {summary.counts['captions']:,.0f} captions, so there are no triples; "
            f"see the answers in {folder / REJECTED}-*.parquet, and try another --model."
        )
    if file:
        _write_whole(file, read_triples(folder))
    say(f"next: ip2p synth pairs {out} -o pairs")
    print(out)


def _writer(config: SynthInstructConfig) -> Callable[[], Writer]:
    """A function that makes the writer, here or on another machine."""
    if config.server is None:
        names: tuple[str, ...] = ("device", "dtype", "batch", *SAMPLING)
        return partial(LocalWriter, config.model, **{name: getattr(config, name) for name in names})
    names = ("way", "together", "rate", "price", "timeout", "patience", *SAMPLING)
    chosen = {name: getattr(config, name) for name in names}
    make = partial(ServerWriter, config.server, config.model, **chosen)
    make(key="")  # checks the settings before any work
    return _Keyed(make, server_key(config.key_variable))


@dataclass(frozen=True)
class _Keyed:
    """Makes the writer for a server; its key is hidden from the repr."""

    make: Callable[..., Writer]
    key: str = field(repr=False)

    def __call__(self) -> Writer:
        return self.make(key=self.key)


def _instruct_lines(config: SynthInstructConfig, summary: jobs.Summary) -> list[str]:
    counts = summary.counts
    lines = [
        f"{summary.rows[TABLE]:,} triples of {counts['captions']:,.0f} captions; "
        f"{counts['captions without']:,.0f} captions have none"
    ]
    refused = {name[len(REFUSED) :]: n for name, n in counts.items() if name.startswith(REFUSED)}
    if refused:
        most = sorted(refused.items(), key=lambda item: -item[1])
        lines.append(
            f"{sum(refused.values()):,.0f} answers were refused: "
            + ", ".join(f"{name} {count:,.0f}" for name, count in most)
        )
    if config.server is not None:
        used: dict[str, Any] = {name: counts[name] for name in asdict(Usage())}
        lines.append(Usage(**used).line())
    return lines


def _write_whole(file: Path, triples: Sequence[Triple]) -> None:
    """Write the single file if needed. Raises InputError if somebody changed it."""
    try:
        there = read_triples(file) if file.exists() else []
    except InputError:
        there = []  # damaged, but written by this job
    if there == triples:
        return
    if there:
        raise InputError(
            f"{file} was changed after it was written, and is left as it is; move it away, and the same "
            "command writes it again."
        )
    write_triples(file, triples)


# --- tuning a language model -----------------------------------------------------------------------


def run_tune_lm(config: SynthTuneConfig) -> None:
    """Tune a language model on triples; its folder goes to stdout."""
    assert config.out is not None, "SynthTuneConfig.check was called"
    if config.out.is_file() or (config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite):
        raise InputError(f"{config.out} is there already; add --overwrite, or choose another folder.")
    tuned = tune_lm(
        config.base,
        config.out,
        None if config.triples is None else read_triples(config.triples),
        **config.model_dump(exclude={"base", "out", "triples"}),
    )
    write_text(config.out / RUN, run_json(config, steps=tuned.steps, left_out=tuned.left_out))
    say(f"use it: ip2p synth instruct captions.txt -o triples.parquet --model {config.out}")
    say(f"or serve it: transformers serve {config.out}, and name it with --server and --model")
    print(config.out)


# --- triples to pairs -----------------------------------------------------------------------------


def run_pairs(config: SynthPairsConfig) -> None:
    """Draw pairs for triples; their folder goes to stdout. Raises InputError also when none was kept."""
    assert config.out is not None, "SynthPairsConfig.check was called"
    triples = read_triples(Path(config.triples).expanduser())[: config.count]
    painter = find_model(config.model, revision=config.revision)
    clip, clip_name = _clip_of(config.clip, config.model, config.revision)
    thresholds = _thresholds(config, PRESETS[preset_for({clip_name})])
    storybook = _model_name(painter, config.model) == STORYBOOK
    scale = config.scale or (STORYBOOK_SCALE if storybook else SCALE)
    how = config.how(storybook=storybook)
    vaes = {"vae": config.vae, "tiny-vae": how["tiny_vae"]}
    named = ("model", "revision", "weights", "vae", "keep", "p", "size", "license", "dtype")
    more = {"p_cross": None, "reweight": 1.0, "blend": None, "parts_from": None}  # recorded only if set
    settings: dict[str, Any] = {
        "content of the triples": _hash([asdict(triple) for triple in triples]),
        **{name: getattr(config, name) for name in named},
        **{name: getattr(config, name) for name, usual in more.items() if getattr(config, name) != usual},
        **how,
        **({"early_margin": config.early_margin} if how["early_at"] else {}),
        **asdict(thresholds),
        **{"scale": scale, "clip": clip_name},
        "content of --model": content_key(painter, *PAINTER_FILES),
        "content of --clip": content_key(clip()),
        **{f"content of --{flag}": content_key(path) for flag, path in _local_models(vaes)},
    }
    chosen = config.changed(scale=scale, **how)
    stage = partial(PairStage, chosen, clip=clip, clip_name=clip_name, thresholds=thresholds)
    size = 1 if config.as_paper else TRIPLES_A_PART
    make_folder(config.out)
    summary = jobs.run_job(
        stage,
        [triples[start : start + size] for start in range(0, len(triples), size)],
        config.out,
        settings=settings,
        unit="triples",
        **worker_options(config, painter, device=config.device),
        overwrite=config.overwrite,
    )
    _write_run(config.out, config, summary, thresholds=asdict(thresholds), scale=scale, used=how)
    for line in _pair_lines(summary):
        say(line)
    if not summary.rows[TABLE]:
        raise InputError(
            f"no pair was kept of {summary.counts['candidates']:,.0f} candidates; look at them with --keep "
            "all into another folder and ip2p synth inspect, and lower --image, --caption or --directional."
        )
    say(f"next: ip2p synth filter {config.out} -o kept")
    print(config.out)


def _pair_lines(summary: jobs.Summary) -> list[str]:
    n = summary.counts
    kept = summary.rows[TABLE]
    lines = [
        f"{kept:,} pairs are kept of {n['candidates']:,.0f} candidates, {n['passed']:,.0f} of which passed; "
        f"{n['prompts_none']:,.0f} of {n['prompts']:,.0f} triples have none, "
        f"{n['prompts_hopeless']:,.0f} were given up early"
    ]
    if n["passed"]:
        lines.append(
            f"{n['evaluations'] / n['passed']:,.0f} pictures through the network for each pair that passed"
        )
    if refused := {name: n[name] for name in ("early", "judged", "overflow") if n[name]}:
        lines.append(
            "refused before they were drawn whole: " + ", ".join(f"{k} {v:,.0f}" for k, v in refused.items())
        )
    if n["cut"]:
        lines.append(
            f"warning: {n['cut']:,.0f} triples have a caption that is longer than the model reads; its end "
            "has no effect"
        )
    return lines


# --- keep the good ones ---------------------------------------------------------------------------


def run_filter_pairs(config: SynthFilterConfig) -> None:
    """Filter a data set; the folder of the kept pairs goes to stdout."""
    assert config.out is not None, "SynthFilterConfig.check was called"
    _apart(config.data, config.out)
    source = open_source(config.data, stream=config.stream, revision=config.revision, split=config.split)
    own = clips_of(source)
    if len(own) > 1 and not config.rescore:
        several = ", ".join(sorted(own))
        say(f"warning: the scores are of several CLIPs ({several}), which do not compare; add --rescore")
    asked = config.clip or (STORYBOOK if own == {STORYBOOK} else CLIP_MODEL)
    clip, clip_name = _clip_of(asked, STORYBOOK, None)
    thresholds = _thresholds(config, PRESETS[preset_for({clip_name} if config.rescore or not own else own)])
    keeping = _keeping(config)
    if config.keep == "all":
        thresholds, keeping = EVERY, dict.fromkeys(keeping)
    safety = None
    if config.safety is not None:
        safety = partial(Classifier, config.safety, device=config.device, batch=config.batch)
    filtered = filter_pairs(
        source,
        config.out,
        thresholds,
        **keeping,
        overwrite=config.overwrite,
        clip=clip,
        clip_name=clip_name,
        clip_key=content_key(clip()) if config.clip is not None else "",
        device=config.device,
        batch=config.batch,
        rescore=config.rescore,
        safety=safety,
        count=config.count,
        **worker_options(config, clip() if _is_local(asked) else None, device=config.device),
    )
    write_text(config.out / RUN, run_json(config, thresholds=asdict(thresholds)))
    for line in filtered.lines():
        say(line)
    if not filtered.kept:
        raise InputError(
            f"no pair of {config.data} stays; look at the scores: ip2p synth inspect {config.out}, and lower "
            "--image, --caption or --directional."
        )
    print(config.out)


def _keeping(config: KeepBestSettings) -> dict[str, Any]:
    """The arguments of `select` besides the thresholds."""
    near = None if config.near_bits < 0 else config.near_bits
    return {"top": config.top or None, "top_whole": config.top_whole or None, "near_bits": near}


def _apart(data: str, out: Path) -> None:
    """Raise InputError if the output is inside the input, or the input inside the output."""
    here = Path(data).expanduser()
    if not here.exists():
        return  # a hub data set
    one, two = here.resolve(), out.expanduser().resolve()
    if one == two or one in two.parents or two in one.parents:
        raise InputError(f"{out} and {data} are one in the other; write what stays into a folder beside it.")


def run_inspect(config: SynthInspectConfig) -> None:
    """Write the page; its path goes to stdout."""
    check_output(config.out, overwrite=config.overwrite)
    keeping = _keeping(config)
    filtered = _filtered(Path(config.data).expanduser())
    if filtered is not None:
        source, scored, asked = filtered
        scored = scored.first(config.count)
        auto = Thresholds(**{name: asked[name] for name in asdict(EVERY)})
        if auto == EVERY:
            auto = PRESETS[preset_for(clips_of(source) | set(scored.clips))]
        else:
            for name in keeping:
                if getattr(config, name) == SynthInspectConfig.model_fields[name].default:
                    keeping[name] = asked.get(name)
    else:
        source = open_source(config.data, split=config.split)
        scored, auto = known_scores(source, config.count), PRESETS[preset_for(clips_of(source))]
        if not any(scored.of(row) for row in range(len(scored))):
            raise InputError(
                f"{config.data} has no scores; measure them: ip2p synth filter {config.data} -o scored "
                "--keep all"
            )
    gone = write_page(
        source,
        scored,
        config.out,
        _thresholds(config, auto),
        **keeping,
        count=config.each,
        side=config.side,
        overwrite=config.overwrite,
    )
    say(f"{len(scored) - sum(gone.values()):,} of {len(scored):,} pairs kept")
    print(config.out)


def _filtered(folder: Path) -> tuple[Source, Scored, dict[str, Any]] | None:
    """For a folder of `synth filter`: the filtered data set, its scores, and the settings.

    None for another folder, and, with a message, if the data set was moved or changed.
    """
    if not (jobs.is_job(folder) and jobs.is_job(folder / SCORES_FOLDER)):
        return None
    asked = jobs.settings(folder)
    if "near_bits" not in asked:
        return None
    known = read_json(folder / RUN).get("settings", {}) if (folder / RUN).is_file() else {}
    opened = {name: known[name] for name in ("split", "revision", "stream") if known.get(name)}
    try:
        source = open_source(asked["source"], **opened)
    except (InputError, ModelError):
        source = None
    if source is None or source.key != asked["key"]:
        say(f"{asked['source']} is not there as it was filtered; only what stays is shown")
        return None
    return source, read_scores(folder / SCORES_FOLDER, source), asked


# --- shared helpers ---------------------------------------------------------------------


def _clip_of(clip: str | None, model: str, revision: str | None) -> tuple[Callable[[], Path], str]:
    """A function that finds the CLIP on any machine, and its name in tables.

    Without a name: the model's own CLIP, under the model's name, if it has one; else the paper's.
    """
    if clip is None:
        folder = find_model(model, revision=revision)
        if (folder / "clip" / "config.json").is_file():
            return partial(find_clip, None, model, revision=revision), _model_name(folder, model)
        clip = CLIP_MODEL
    return partial(find_clip, clip, model), called(clip)


def _local_models(models: Mapping[str, str | None]) -> Iterator[tuple[str, Path]]:
    """The models that are local files or folders, by flag."""
    for flag, model in models.items():
        if model is not None and (path := Path(model).expanduser()).exists():
            yield flag, path


def _is_local(model: str) -> bool:
    """Whether a model is a local folder or packaged."""
    return Path(model).expanduser().is_dir() or model in packaged_models()


def _model_name(folder: Path, model: str) -> str:
    """The name in the model's card, else `model`."""
    card = folder / "ip2p.json"
    name = read_json(card).get("name") if card.is_file() else None
    return str(name or called(model))


def _thresholds(
    config: SynthPairsConfig | SynthFilterConfig | SynthInspectConfig, auto: Thresholds
) -> Thresholds:
    """The thresholds of the preset, by default `auto`, overridden by those of the config."""
    preset = auto if config.preset == "auto" else PRESETS[config.preset]
    given = {name: getattr(config, name) for name in asdict(preset)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def part_size(captions: int) -> int:
    """Captions per part; depends only on their number, so that a resumed job has the same parts."""
    fewest, most = CAPTIONS_A_PART
    return min(most, max(fewest, -(-captions // PARTS)))


def _hash(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]


def _write_run(folder: Path, config: Settings, summary: jobs.Summary, **also: object) -> None:
    if summary.made or not (folder / RUN).exists():
        write_text(folder / RUN, run_json(config, **also))
