"""`ip2p synth`: from captions to a filtered set of pairs. It puts the parts of `synth` together.

Each verb is a job in a folder (`jobs`), which the same call goes on with; what decides its result may not
change meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ip2p import jobs
from ip2p.config import (
    SynthFilterConfig,
    SynthInspectConfig,
    SynthInstructConfig,
    SynthPairsConfig,
    SynthTuneConfig,
    run_json,
)
from ip2p.errors import InputError
from ip2p.files import check_output, content_key, make_folder, write_text
from ip2p.models.bundle import called, find_model
from ip2p.models.load import read_json
from ip2p.rank import CLIP_MODEL, find_clip
from ip2p.synth.captions import BLOCK_LIST, Rules, read_block_list, read_captions
from ip2p.synth.filter import PRESETS, STORYBOOK, Thresholds, clips_of, preset_for
from ip2p.synth.instruct import Limits, LocalWriter, Writer, find_lm
from ip2p.synth.records import SCALE, TABLE, Triple, read_triples, write_triples
from ip2p.synth.server import KEY, ServerWriter
from ip2p.synth.stages import REFUSED, REJECTED, InstructStage, PairStage
from ip2p.terminal import say

RUN = "run.json"
CAPTIONS_A_PART = 8, 64  # fewest and most
PARTS = 16  # a small job has so many, so that it can be seen to move and little is lost when it is stopped
TRIPLES_A_PART = 8
STORYBOOK_SCALE = (3.0, 5.0)  # its own guidance is 4
# What a painter consists of: its folder may hold a CLIP and a language model besides.
PAINTER_FILES = ("unet/*", "vae/*", "text_encoder*/*", "tokenizer*/*", "scheduler/*", "model_index.json")
OUR_KEY = "IP2P_API_KEY"


# --- captions to triples --------------------------------------------------------------------------


def instruct(config: SynthInstructConfig) -> None:
    """Write edits of captions; the path of the triples goes to stdout.

    Raises InputError also when no answer at all was taken: there is nothing to go on with then.
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
    limits = Limits(block=block, spatial=not config.allow_spatial)
    named = ("model", "server", "way", "shots", "edits", "retries", "allow_spatial")
    sampled = ("temperature", "frequency_penalty", "max_tokens")
    settings = {name: getattr(config, name) for name in (*named, *sampled)}
    settings |= {"captions": config.captions, "content of the captions": _hash(texts)}
    settings["content of --block-list"] = _hash(block)
    if config.server is None:
        settings |= {"dtype": config.dtype, "content of --model": content_key(find_lm(config.model))}
    size = part_size(len(texts))
    told = jobs.run(
        partial(InstructStage, _writer(config), edits=config.edits, retries=config.retries, limits=limits),
        [texts[start : start + size] for start in range(0, len(texts), size)],
        folder,
        settings=settings,
        unit="captions",
        cluster=_cluster(config),
        threads=_threads(config),
        overwrite=config.overwrite,
    )
    _write_run(folder, config, told)
    for line in _instruct_lines(config, told):
        say(line)
    if not told.rows[TABLE]:
        raise InputError(
            f"no answer was taken of {told.counts['captions']:,.0f} captions, so there are no triples; see "
            f"the answers in {folder / REJECTED}-*.parquet, and try another --model."
        )
    if file:
        _write_whole(file, read_triples(folder))
    say(f"next: ip2p synth pairs {out} -o pairs")
    print(out)


def _writer(config: SynthInstructConfig) -> Callable[[], Writer]:
    """What makes the writer, here or on another machine."""
    sampling: dict[str, Any] = {
        "temperature": config.temperature,
        "frequency_penalty": config.frequency_penalty,
        "max_tokens": config.max_tokens,
    }
    if config.server is None:
        return partial(
            LocalWriter,
            config.model,
            device=config.device,
            dtype=config.dtype,
            batch=config.batch,
            shots=config.shots or 0,
            **sampling,
        )
    make = partial(
        ServerWriter,
        config.server,
        config.model,
        way=config.way,
        shots=config.shots,
        together=config.together,
        rate=config.rate,
        price=config.price,
        timeout=config.timeout,
        patience=config.patience,
        **sampling,
    )
    make(key="")  # so that its settings are checked before the work
    return _Keyed(make, _key(config))


@dataclass(frozen=True)
class _Keyed:
    """A server's writer with its key, which does not show where this is printed."""

    make: Callable[..., Writer]
    key: str = field(repr=False)

    def __call__(self) -> Writer:
        return self.make(key=self.key)


def _key(config: SynthInstructConfig) -> str:
    if config.key_variable is None:
        return os.environ.get(OUR_KEY) or os.environ.get(KEY) or ""
    try:
        return os.environ[config.key_variable]
    except KeyError:
        raise InputError(
            f"the environment has no {config.key_variable}, which --key-variable names; set it to the key."
        ) from None


def _instruct_lines(config: SynthInstructConfig, told: jobs.Summary) -> list[str]:
    counts = told.counts
    lines = [
        f"{told.rows[TABLE]:,} triples of {counts['captions']:,.0f} captions; "
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
        cost = f", cost {counts['cost']:,.4f}" if counts["cost"] else ""
        lines.append(
            f"{counts['requests']:,.0f} answers, {counts['retries']:,.0f} retries, "
            f"{counts['prompt_tokens']:,.0f} tokens in, {counts['answer_tokens']:,.0f} out{cost}"
        )
    return lines


def _write_whole(file: Path, triples: Sequence[Triple]) -> None:
    """The one file, unless it is there as it should be."""
    try:
        if file.exists() and read_triples(file) == triples:
            return
    except InputError:
        pass  # it is damaged, and this job's
    write_triples(file, triples)


# --- a language model of one's own ----------------------------------------------------------------


def tune_lm(config: SynthTuneConfig) -> None:
    """Tune a language model on triples; its folder goes to stdout."""
    from ip2p.synth.tune import Tuning
    from ip2p.synth.tune import tune_lm as tune

    assert config.out is not None, "SynthTuneConfig.check was called"
    if config.out.is_file() or (config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite):
        raise InputError(f"{config.out} is there already; add --overwrite, or choose another folder.")
    tuned = tune(
        config.base,
        config.out,
        None if config.triples is None else read_triples(config.triples),
        tuning=Tuning(
            lora=config.lora,
            epochs=config.epochs,
            batch=config.batch,
            rate=config.rate,
            warm_up=config.warm_up,
            weight_decay=config.weight_decay,
            clip=config.clip_norm,
            max_length=config.max_length,
            seed=config.seed,
        ),
        backend=config.backend,
        device=config.device,
        revision=config.revision,
    )
    write_text(config.out / RUN, run_json(config, steps=tuned.steps, left_out=tuned.left_out))
    say(f"use it: ip2p synth instruct captions.txt -o triples.parquet --model {config.out}")
    say(f"or serve it: transformers serve {config.out}, and name it with --server and --model")
    print(config.out)


# --- triples to pairs -----------------------------------------------------------------------------


def pairs(config: SynthPairsConfig) -> None:
    """Draw pairs for triples; their folder goes to stdout. Raises InputError also when none was kept."""
    assert config.out is not None, "SynthPairsConfig.check was called"
    triples = read_triples(Path(config.triples).expanduser())[: config.count]
    painter = find_model(config.model, revision=config.revision)
    clip, clip_name = _clip_of(config.clip, config.model, config.revision)
    thresholds = _thresholds(config, preset_for({clip_name}))
    scale = config.scale or (STORYBOOK_SCALE if _model_name(painter, config.model) == STORYBOOK else SCALE)
    how = config.how()
    named = ("model", "revision", "weights", "vae", "keep", "p", "size", "license", "dtype")
    settings: dict[str, Any] = {
        "triples": config.triples,
        "content of the triples": _hash([asdict(triple) for triple in triples]),
        **{name: getattr(config, name) for name in named},
        **how,
        **({"early_margin": config.early_margin} if how["early_at"] else {}),
        **asdict(thresholds),
        **{"scale": scale, "clip": clip_name},
        "content of --model": content_key(painter, *PAINTER_FILES),
        "content of --clip": content_key(clip()),
    }
    size = 1 if config.as_paper else TRIPLES_A_PART
    make_folder(config.out)
    told = jobs.run(
        partial(PairStage, config, clip=clip, clip_name=clip_name, thresholds=thresholds, scale=scale),
        [triples[start : start + size] for start in range(0, len(triples), size)],
        config.out,
        settings=settings,
        unit="triples",
        cluster=_cluster(config),
        threads=_threads(config),
        overwrite=config.overwrite,
    )
    _write_run(config.out, config, told, thresholds=asdict(thresholds), scale=scale, used=how)
    for line in _pair_lines(told):
        say(line)
    if not told.rows[TABLE]:
        raise InputError(
            f"no pair was kept of {told.counts['candidates']:,.0f} candidates; look at them with --keep all "
            "into another folder and ip2p synth inspect, and lower --image, --caption or --directional."
        )
    say(f"next: ip2p synth filter {config.out} -o kept")
    print(config.out)


def _pair_lines(told: jobs.Summary) -> list[str]:
    n = told.counts
    kept = told.rows[TABLE]
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


def filter_pairs(config: SynthFilterConfig) -> None:
    """Filter a data set; the folder of what stays goes to stdout."""
    from ip2p.data.loading import open_source
    from ip2p.devices import pick_device
    from ip2p.synth.filter import filter_pairs as run_filter

    assert config.out is not None, "SynthFilterConfig.check was called"
    source = open_source(config.data, stream=config.stream, revision=config.revision, split=config.split)
    own = clips_of(source)
    asked = config.clip or (STORYBOOK if own == {STORYBOOK} else CLIP_MODEL)
    clip, clip_name = _clip_of(asked, STORYBOOK, None)
    clips = {clip_name} if config.rescore or not own else own
    thresholds = _thresholds(config, preset_for(clips))
    top, near = config.top or None, None if config.near_bits < 0 else config.near_bits
    if config.keep == "all":
        thresholds, top, near = Thresholds(image=-2, caption=-2, directional=-2), None, None
    filtered = run_filter(
        source,
        config.out,
        thresholds,
        top=top,
        near_bits=near,
        overwrite=config.overwrite,
        clip=clip,
        clip_name=clip_name,
        device=str(pick_device(config.device)),
        batch=config.batch,
        rescore=config.rescore,
        count=config.count,
        cluster=_cluster(config),
        threads=_threads(config),
    )
    write_text(config.out / RUN, run_json(config, thresholds=asdict(thresholds)))
    for line in filtered.lines():
        say(line)
    print(config.out)


def inspect(config: SynthInspectConfig) -> None:
    """Write the page; its path goes to stdout."""
    from ip2p.data.loading import open_source
    from ip2p.synth.filter import known_scores
    from ip2p.synth.inspect import inspect as write_page

    source = open_source(config.data, split=config.split)
    thresholds = _thresholds(config, preset_for(clips_of(source)))
    write_page(
        source,
        known_scores(source, config.count),
        config.out,
        thresholds,
        top=config.top or None,
        near_bits=None if config.near_bits < 0 else config.near_bits,
        count=config.each,
        side=config.side,
        overwrite=config.overwrite,
    )
    print(config.out)


# --- what they have in common ---------------------------------------------------------------------


def _clip_of(clip: str | None, model: str, revision: str | None) -> tuple[Callable[[], Path], str]:
    """What finds the CLIP on any machine, and what tables call it.

    Without a name it is the model's own if it has one, and is called as the model, else the paper's.
    """
    if clip is None:
        folder = find_model(model, revision=revision)
        if (folder / "clip" / "config.json").is_file():
            return partial(find_clip, None, model, revision=revision), _model_name(folder, model)
        clip = CLIP_MODEL
    return partial(find_clip, clip, model), called(clip)


def _model_name(folder: Path, model: str) -> str:
    """What a model calls itself in its card, else what it was called."""
    card = folder / "ip2p.json"
    said = read_json(card).get("name") if card.is_file() else None
    return str(said or called(model))


def _thresholds(config: SynthPairsConfig | SynthFilterConfig | SynthInspectConfig, auto: str) -> Thresholds:
    preset = PRESETS[auto if config.preset == "auto" else config.preset]
    given = {name: getattr(config, name) for name in asdict(preset)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def _cluster(config: SynthInstructConfig | SynthPairsConfig | SynthFilterConfig) -> jobs.Cluster | None:
    if config.ray is None:
        return None
    return jobs.Cluster(
        address=config.ray, workers=config.ray_workers, cpus=config.threads or 1, gpus=config.ray_gpus
    )


def _threads(config: SynthInstructConfig | SynthPairsConfig | SynthFilterConfig) -> int | None:
    return config.threads or (None if config.ray is None else 1)


def part_size(captions: int) -> int:
    """From their number alone, so that a job that goes on has the same parts."""
    fewest, most = CAPTIONS_A_PART
    return min(most, max(fewest, -(-captions // PARTS)))


def _hash(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]


def _write_run(folder: Path, config: object, told: jobs.Summary, **also: object) -> None:
    if told.made or not (folder / RUN).exists():
        write_text(folder / RUN, run_json(config, **also))
