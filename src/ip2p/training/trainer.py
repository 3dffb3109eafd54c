"""`ip2p train`: from pairs and a base model to an editor. It puts the parts of `train` together.

The output folder is the editor. In its folder `training` lie the checkpoints, the log, the validations and
what was left out of the data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ip2p.base.devices import has_fast_bf16, pick_device
from ip2p.base.errors import InputError, translated_errors
from ip2p.base.files import make_folder, write_text
from ip2p.base.ledger import lock_folder
from ip2p.base.terminal import say
from ip2p.data.loading import open_source
from ip2p.data.records import Pair, Source
from ip2p.diffusion.schedule import alpha_bar_from_config
from ip2p.editing.rank import find_clip
from ip2p.evaluation.storybook import score
from ip2p.models.base import load_base, new_from_config, prediction_of
from ip2p.models.bundle import Bundle
from ip2p.models.clip import Clip
from ip2p.models.memory import bytes_on, free_bytes
from ip2p.models.save import Data, model_card, save_editor
from ip2p.models.text import encode_prompts
from ip2p.settings import Split, first_difference, meta_of, run_json
from ip2p.training.budget import training_memory
from ip2p.training.cache import Latents, TextCache, build_cache, encode_pictures, text_key, weights_key
from ip2p.training.loop import LoopConfig, Result, fit, new_accelerator
from ip2p.training.loss import Shares
from ip2p.training.objective import Draws, EditBatch, EditTask, Objective
from ip2p.training.samples import CachedSamples, PooledSamples, Reader, Share, Words, read_cached
from ip2p.training.settings import TrainConfig
from ip2p.training.storybook.source import StorybookSource
from ip2p.training.transform import Transform
from ip2p.training.validation import Curves, HeldOut, Watch, held_out, held_out_loss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Unpack

    from ip2p.editing.editor import Editor
    from ip2p.training.arguments import TrainArguments

log = logging.getLogger("ip2p")

STORYBOOK = "storybook"
TRAINING = "training"  # the folder inside the output
LORA_FILE = "pytorch_lora_weights.safetensors"
DONE = "done.json"
# Of the settings, what a model's card does not tell.
UNTOLD = ("output", "base", "data", "config", "debug", "cache", "track", "profile", "ray", "seconds", "keep")


class Recipe:
    """What a training does in its own way; `distill.Distillation` does it in another."""

    name = "train"

    def open(self, config: TrainConfig, device: torch.device) -> Bundle:
        """The networks to start from; the UNet is the one to train. Raises InputError and ModelError."""
        bundle = open_base(config, device)
        if bundle.card.text_cfg_range is not None:
            raise InputError(
                f"{config.base} is distilled, and its guidance would be lost. Train the model that it was "
                "distilled from, and distill the result: ip2p distill."
            )
        return bundle

    def objective(self, config: TrainConfig, prediction: str) -> Objective:
        """The loss; `config` has the shares of samples without a condition."""
        return Objective(
            prediction=prediction,
            shares=shares_of(config),
            snr_clip=None if config.min_snr is None else (0.0, config.min_snr),
        )

    def task(
        self, config: TrainConfig, bundle: Bundle, objective: Objective, size: tuple[int, int]
    ) -> EditTask:
        """What is trained, around the bundle's UNet; size: width and height in pixels."""
        return EditTask(
            bundle.unet,
            alpha_bar_from_config(bundle.scheduler_config),
            objective,
            latent_scale=bundle.latent_scale,
            condition_scale=bundle.condition_scale,
        )

    def validation_steps(self, config: TrainConfig) -> int:
        """Sampling steps of a validation's edits."""
        return config.validate_steps

    def notes(self, bundle: Bundle) -> str:
        """A paragraph for the README; "" for none."""
        return ""


def shares_of(config: TrainConfig) -> Shares:
    """The shares of samples that lose their text, their picture, both."""
    return Shares(config.text_null, config.image_null, config.both_null)


def train(config: TrainConfig | None = None, **changes: Unpack[TrainArguments]) -> Path:
    """Train an editor, or resume, and return its folder. config and changes: what `TrainConfig` has.

    `train(data="pairs", base="timbrooks/instruct-pix2pix", output="editor", steps=1000)`. Raises InputError,
    ModelError and ResourceError.
    """
    return start((config or TrainConfig()).changed(**changes), Recipe)


def start(config: TrainConfig, recipe: type[Recipe]) -> Path:
    """Run a training, here or on a Ray cluster, and return its folder. Raises as `run` does."""
    config.check()
    if config.ray is not None:
        from ip2p.training.ray import launch

        make_folder(Path(str(config.output)))
        launch(
            partial(run, recipe=recipe),
            config.changed(ray=None),
            workers=config.ray,
            storage=Path(str(config.output)) / TRAINING / "ray",
            use_gpu=False if config.device == "cpu" else None,
        )
    else:
        run(config, recipe)
    return Path(str(config.output))


def run(config: TrainConfig, recipe: type[Recipe] = Recipe) -> Result | None:
    """What every process of a training does; None when the run was finished already.

    Raises InputError, ModelError and ResourceError as `fit`, `build_cache` and `load_base` do.
    """
    assert config.output is not None, "TrainConfig.check was called"
    folder = Path(config.output)
    make_folder(folder)
    with lock_folder(folder) if is_main_process() else contextlib.nullcontext():
        if (ended := _finished(config, folder)) is not None:
            if is_main_process():
                say(ended)
            return None
        with translated_errors(memory=f"out of memory; try {_memory_advice(config)}."):
            return _run(config, folder, recipe())


def is_main_process() -> bool:
    """Whether this is the first of a training's processes, which writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _finished(config: TrainConfig, folder: Path) -> str | None:
    """What to say of a run that has nothing left to do."""
    try:
        done = json.loads((folder / TRAINING / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not (folder / "model_index.json").exists():
        return None
    _check_same(config, folder)
    if done["step"] >= config.steps:
        return f"{folder} is finished: {done['step']} steps. Give more --steps to go on."
    if done["stopped_early"] and done["asked"] == config.steps:
        return f"{folder} is finished: it was no longer getting better at step {done['step']}."
    return None


def _check_same(config: TrainConfig, folder: Path) -> None:
    """Raise InputError when a finished run had other settings that decide its numbers."""
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    difference = first_difference(config, before)
    if difference is not None:
        flag, old, new = difference
        raise InputError(
            f"{folder} was trained with {flag} {old}, and now it is {new}; use the same again, or choose "
            "another folder with --output."
        )


@dataclass
class _Setting:
    """What a run stands on."""

    config: TrainConfig
    recipe: Recipe
    folder: Path  # of the run's own files
    accelerator: Accelerator
    bundle: Bundle
    source: Source
    transform: Transform
    objective: Objective
    share: Share

    @property
    def autocast(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)


def _run(config: TrainConfig, output: Path, recipe: Recipe) -> Result:
    started = time.monotonic()
    accelerator = _accelerator(config, output / TRAINING)
    main = accelerator.is_main_process
    bundle = recipe.open(config, accelerator.device)
    if config.prediction != "auto":
        # The folder that comes out says it too, or it would be sampled wrongly.
        told = {**bundle.scheduler_config, "prediction_type": config.prediction}
        bundle = replace(bundle, scheduler_config=told)
    side = config.size or bundle.card.native_size
    size = (side, side) if isinstance(side, int) else side
    for name, pixels in zip(("width", "height"), size, strict=True):
        if pixels % bundle.size_multiple:
            fits = max(1, round(pixels / bundle.size_multiple)) * bundle.size_multiple
            raise InputError(
                f"--size: the {name} of {pixels} pixels is not a multiple of {bundle.size_multiple}, as this "
                f"model needs. Try {fits}."
            )
    source = find_source(
        config.data,
        size[0] if size[0] == size[1] else None,
        seed=config.seed,
        split=config.split,
        stream=config.stream,
        revision=config.data_revision,
        columns=config.columns,
    )
    transform = Transform(size=size, resize_to=config.resize_to, flip=not (config.no_flip or source.endless))
    objective = recipe.objective(config, prediction_of(bundle))
    if config.min_snr is not None and alpha_bar_from_config(bundle.scheduler_config)[-1] < 1e-6:
        if objective.prediction == "epsilon":
            raise InputError(
                "--min-snr divides by the signal-to-noise ratio, which is 0 at this base's last noise level; "
                "leave it away, or use --prediction v_prediction."
            )
        say("warning: at the last noise level, which has no signal, --min-snr gives velocity no weight")
    world = accelerator.num_processes
    micro = config.micro_batch or max(1, config.batch // world)
    share = Share(batch=config.batch, micro=micro, rank=accelerator.process_index, world=world)
    here = _Setting(
        config, recipe, output / TRAINING, accelerator, bundle, source, transform, objective, share
    )
    here.folder.mkdir(parents=True, exist_ok=True)
    start_key = weights_key(bundle.unet)
    task = _task(here)
    _check_memory(here)
    samples, reader, held, data = _samples(here)
    if config.stop_when_worse and not held:
        raise InputError(
            f"--stop-when-worse needs held-out pairs, at most a tenth of all, and {config.data} has "
            f"{data.rows} rows; leave it away, or give more data."
        )
    checks = _Checks(here, task, reader, held) if main and held else None
    if main:
        write_text(output / "run.json", run_json(config))
    result = fit(
        task,
        samples,
        LoopConfig(
            steps=config.steps,
            batch=config.batch,
            lr=config.lr,
            schedule=config.schedule,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            clip_norm=config.clip_norm or None,
            ema=config.ema or None,
            ema_updates=config.ema_updates,
            ema_on_cpu=config.ema_on_cpu,
            optimizer=config.optimizer,
            nan_steps=config.nan_steps,
            keep=config.keep,
            save_every=config.save_every,
            check_every=config.validate_every or None,
        ),
        folder=here.folder,
        accelerator=accelerator,
        fingerprint=fingerprint(config, source, start_key),
        name=recipe.name,
        deadline=None if config.seconds is None else started + config.seconds,
        # The others wait for the main process as it validates, and learn whether to stop.
        check=checks or (_no_check if held else None),
        parts={"watch": checks.watch} if checks is not None else {},
        profile=config.profile,
        say=say if main else lambda text: None,
    )
    if main and result.finished:
        if checks is not None and not result.stopped_early:
            checks(result.step)
        _write(here, output, task, data, checks)
        done = {"step": result.step, "stopped_early": result.stopped_early, "asked": config.steps}
        write_text(here.folder / DONE, json.dumps(done) + "\n")
    elif main:
        say("time is up; the same command goes on from here")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def fingerprint(config: TrainConfig, source: Source, start: str) -> dict[str, Any]:
    """What must be the same when a run goes on: the settings that decide its numbers, data and base."""
    fields = type(config).model_fields
    kept = {name: value for name, value in config.as_dict().items() if meta_of(fields[name]).same_job}
    if config.schedule == "cosine":
        kept["steps"] = config.steps  # the learning rate's way down follows from it
    if config.optimizer == "adamw":
        kept.pop("optimizer")  # checkpoints of earlier versions do not name it
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    return kept | {"content of --data": source.key, "weights of --base": start}


# --- the parts ---


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    device = pick_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type in ("cuda", "cpu") and has_fast_bf16(device) else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            f"--precision fp16 needs a CUDA device, and this is {device.type}; use bf16 or fp32."
        )
    number = "no" if precision == "fp32" else precision
    tracker = _trackers(config.track)
    if tracker is None:
        return new_accelerator(device, number)
    accelerator = new_accelerator(device, number, log_with=tracker, project_dir=str(folder))
    told = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.as_dict().items()}
    accelerator.init_trackers(tracker, config=told)
    return accelerator


def _trackers(track: str) -> str | None:
    if track == "none":
        return None
    installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if track == "auto":
        return "tensorboard" if installed else None
    if track == "tensorboard" and not installed:
        raise InputError("--track tensorboard needs it: pip install 'ip2p[track]'")
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    if track not in known:
        raise InputError(f"--track is {track!r}; choose one of: auto, none, {', '.join(known)}.")
    if track != "tensorboard" and not importlib.util.find_spec(track):
        raise InputError(f"--track {track} needs it: pip install {track}")
    return track


def open_base(config: TrainConfig, device: torch.device) -> Bundle:
    """The networks to start from; a UNet's config with --parts-from starts from noise."""
    path = Path(config.base).expanduser()
    folder = path.is_dir() and not (path / "model_index.json").exists()
    trained = folder and any(path.glob("diffusion_pytorch_model*"))
    if (path.suffix == ".json" and path.is_file()) or (
        folder and not trained and (path / "config.json").is_file()
    ):
        if config.parts_from is None:
            raise InputError(
                f"{config.base} is the config of a UNet alone; add --parts-from MODEL for its autoencoder, "
                "its text encoder and its noise schedule."
            )
        return new_from_config(
            path,
            config.parts_from,
            device=device,
            revision=config.revision,
            vae=config.vae,
            seed=config.seed,
        )
    return load_base(
        config.base,
        device=device,
        revision=config.revision,
        vae=config.vae,
        parts_from=config.parts_from,
    )


def find_source(
    data: str,
    side: int | None,
    *,
    seed: int,
    split: str,
    stream: bool,
    revision: str | None,
    columns: str | None = None,
) -> Source:
    """The data named; `storybook` is drawn as it is needed, `side` pixels wide and high."""
    if data != STORYBOOK or Path(STORYBOOK).exists():
        return open_source(data, stream=stream, revision=revision, split=split, columns=columns)
    if columns:
        raise InputError("the storybook is drawn and has no columns; remove --columns.")
    if side is None:
        raise InputError("storybook pages are square; give --size one side, as in --size 256.")
    if split not in typing.get_args(Split):
        raise InputError(f"--split is {split!r}; of the storybook: {', '.join(typing.get_args(Split))}.")
    return StorybookSource(side, seed=seed, split=typing.cast(Split, split))


def cache_home(config: TrainConfig) -> Path:
    if config.cache is not None:
        return config.cache
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ip2p"


def _task(here: _Setting) -> EditTask:
    config, bundle = here.config, here.bundle
    unet: Any = bundle.unet
    cells = here.transform.size[0] * here.transform.size[1] // bundle.latent_factor**2
    if here.accelerator.device.type == "cpu" and cells <= 256:
        from diffusers.models.attention_processor import AttnProcessor

        # With so few cells the fused kernel's backward pass is the slower one on a CPU, most of all in bf16.
        unet.set_attn_processor(AttnProcessor())
    if config.lora is not None:
        from ip2p.training.lora import add_lora

        add_lora(
            unet,
            config.lora,
            config.lora_alpha,
            targets=config.lora_targets,
            conv_in=bundle.widened,
            seed=config.seed,
        )
    if config.checkpointing:
        unet.enable_gradient_checkpointing()
    if here.accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = True
    if config.compile:
        unet.compile()
    return here.recipe.task(config, bundle, here.objective, here.transform.size)


def _check_memory(here: _Setting) -> None:
    """Print what the run needs on its device. Raises ResourceError when it cannot fit."""
    config, bundle, device = here.config, here.bundle, here.accelerator.device
    networks = [bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2]
    parts = [part for part in networks if part is not None]
    width, height = here.transform.size
    need = training_memory(
        bundle.unet,
        parts[1:],
        micro_batch=here.share.micro,
        latent_size=(height // bundle.latent_factor, width // bundle.latent_factor),
        optimizer=config.optimizer,
        ema=bool(config.ema) and not (config.ema_on_cpu and device.type != "cpu"),
        half=here.autocast is not None,
        checkpointing=config.checkpointing,
    )
    need = replace(need, loaded=bytes_on([parts], device))
    free = free_bytes(device)
    warning = need.check(str(device), free, _memory_advice(config))
    if here.accelerator.is_main_process:
        say(need.line(str(device), free))
        if warning is not None:
            say(warning)


def _memory_advice(config: TrainConfig) -> str:
    """What makes a run need less memory, of what it does not do yet."""
    ways = []
    if (config.micro_batch or config.batch) > 1:
        half = (config.micro_batch or config.batch) // 2
        ways.append(f"--micro-batch {half} (the result stays the same)")
    if not config.checkpointing:
        ways.append("--checkpointing")
    if config.lora is None:
        ways.append("--lora 16")
    if config.ema and not config.ema_on_cpu and config.device != "cpu":
        ways.append("ema_on_cpu: true in a recipe")
    if config.optimizer == "adamw":
        ways.append("optimizer: adamw8bit in a recipe")
    return ", ".join(ways) or "a smaller --size or another --device"


def _encode_texts(here: _Setting) -> Callable[[list[str]], Any]:
    return lambda texts: encode_prompts(here.bundle, texts, here.transform.size)


def _samples(here: _Setting) -> tuple[Any, Reader, list[Pair], Data]:
    """The samples, what reads their texts, what is held out, and what the card says of the data."""
    config, source = here.config, here.source
    if config.no_cache or config.stream or source.endless:
        return _online(here)
    home = cache_home(config)
    make_folder(home)
    more: dict[str, Any] = {"rank": here.share.rank, "world": here.share.world, "dtype": config.cache_dtype}
    cache = build_cache(
        source,
        here.bundle,
        here.transform,
        home / "latents",
        device=here.accelerator.device,
        autocast=here.autocast,
        workers=config.workers,
        **more,
    )
    texts = ["", *cache.instructions]
    told = TextCache.build(
        texts,
        _encode_texts(here),
        home / "texts",
        key=text_key(here.bundle, here.transform.size),
        **more,
    )
    held, kept = _apart(config, cache.prompts)
    words = read_cached(told)
    samples = CachedSamples(
        cache,
        words,
        here.transform,
        here.objective,
        here.share,
        seed=config.seed,
        kept=kept,
        ahead=here.accelerator.device.type != "cpu",
    )
    data = Data(name=config.data, rows=len(kept), quarantined=len(cache.broken), license=config.data_license)
    return samples, words, [source[cache.rows[place]] for place in held], data


def _apart(config: TrainConfig, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which rows are held out, one of each prompt, and which are trained on: those of all other prompts."""
    first: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        first.setdefault(prompt, place)
    names = list(first)
    count = min(config.held_out, len(names) // 10) if config.validate_every else 0
    out = {names[k] for k in held_out(names, count, config.seed)}
    held = [place for prompt, place in first.items() if prompt in out]
    return held, [place for place, prompt in enumerate(prompts) if prompt not in out]


def _online(here: _Setting) -> tuple[Any, Reader, list[Pair], Data]:
    config, source, bundle = here.config, here.source, here.bundle
    known: dict[str, Any] = {}  # texts come again, most of all the empty one

    def words(texts: list[str]) -> Words:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) > 20_000:
            known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            with torch.no_grad():
                told = encode_prompts(bundle, new, here.transform.size)
            for k, text in enumerate(new):
                known[text] = [
                    None if x is None else x[k].cpu() for x in (told.hidden, told.pooled, told.time_ids)
                ]
        columns: Any = zip(*(known[text] for text in texts), strict=True)
        hidden, pooled, time_ids = (None if rows[0] is None else torch.stack(rows) for rows in columns)
        assert hidden is not None, "every text has hidden states"
        return Words(hidden, pooled, time_ids)

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [encode_pictures(bundle.vae, some, autocast=here.autocast) for some in pixels.split(16)]
        mean, std = (torch.cat(values).contiguous() for values in zip(*parts, strict=True))
        return mean, std

    kept: list[int] | None = None
    if source.endless:
        count = config.held_out if config.validate_every else 0
        apart = StorybookSource(here.transform.size[0], seed=config.seed, split="test", count=max(1, count))
        pairs = [apart[row] for row in range(count)]
    else:
        # Texts and ids would have to be read first, of the whole data.
        prompts = getattr(source, "prompts", None)
        if prompts is None:
            say("without a cache, pairs are drawn and held out one by one, not prompt by prompt")
        held, kept = _apart(config, prompts or [str(row) for row in range(len(source))])
        pairs = [source[row] for row in held]
    bundle.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    samples = PooledSamples(
        source,
        words,
        here.transform,
        encode,
        here.objective,
        here.share,
        seed=config.seed,
        # No more than the run will use, which matters for short ones.
        pool=min(config.pool, -(-config.steps * config.batch // config.reuse)),
        reuse=config.reuse,
        workers=config.workers,
        kept=kept,
        quarantine=here.folder / "quarantine.jsonl" if here.share.rank == 0 else None,
    )
    rows = None if kept is None else len(kept)
    return samples, words, pairs, Data(name=config.data, rows=rows, license=config.data_license)


# --- validation ---


class _Few:
    """The latents of the held-out pairs, as `held_out_loss` reads them from a cache."""

    def __init__(self, ids: Sequence[str], latents: Latents) -> None:
        self.ids, self.latents = ids, latents

    def read(self, places: Sequence[int], variants: Sequence[int]) -> Latents:
        rows = list(places)
        return Latents(self.latents.before[rows], self.latents.mean[rows], self.latents.std[rows])


class _Checks:
    """Called at a step it validates, shows and logs; True when it is time to stop (`--stop-when-worse`)."""

    def __init__(self, here: _Setting, task: EditTask, reader: Reader, pairs: Sequence[Pair]) -> None:
        self.here, self.task, self.reader = here, task, reader
        config, bundle, size = here.config, here.bundle, here.transform.size
        drawn = isinstance(here.source, StorybookSource)
        self.edits = HeldOut(
            pairs,
            here.folder,
            size,
            settings={"steps": here.recipe.validation_steps(config)},
            clip=self._clip(),
            score=self._score if drawn else None,
            # A grid's row is three pictures; so many rows can be looked at.
            shown=16,
        )
        with torch.no_grad():
            both = [
                encode_pictures(bundle.vae, some, autocast=here.autocast)
                for some in (self.edits.before, self.edits.after)
            ]
        (before, _), (mean, std) = [[part.cpu() for part in some] for some in both]
        self.few = _Few([pair.id for pair in self.edits.pairs], Latents(before, mean, std))
        self.curves = Curves(here.folder)
        key = config.watch
        if key == "auto":
            key = "success" if drawn else "clip_directional" if self.edits.clip is not None else "loss"
        self.watch = Watch(key, config.stop_when_worse or 0, higher_is_better=key not in ("loss", "l1"))

    def _clip(self) -> Clip | None:
        config, device = self.here.config, self.here.accelerator.device
        if config.clip is None and not (self.here.bundle.folder / "clip" / "config.json").is_file():
            return None  # curves without CLIP are curves too
        return Clip.load(find_clip(config.clip, str(self.here.bundle.folder)), device)

    def _score(self, editor: Editor) -> dict[str, float]:
        told = score(
            editor,
            count=4 * len(self.edits.pairs),
            seed=self.here.config.seed,
            steps=self.here.recipe.validation_steps(self.here.config),
            size=self.here.transform.size[0],
            splits=("test",),
            baselines=(),
        )["splits"]["test"]["model"]["overall"]
        kept = told["preservation"]
        return {"success": told["nearest"]["value"], "kept": kept["value"] if kept else 0.0}

    def __call__(self, step: int) -> bool:
        self.curves.forget_after(step - 1)
        started = time.monotonic()
        numbers = {"loss": held_out_loss(self._loss, self.few, range(len(self.few.ids)))}  # type: ignore[arg-type]
        numbers |= self.edits(step, self.here.bundle)
        self.curves.add(step, numbers)
        self.curves.draw()
        with contextlib.suppress(AttributeError):
            self.here.accelerator.log({f"held out/{k}": v for k, v in numbers.items()}, step=step)
        told = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        say(f"held out: step {step} {told} ({time.monotonic() - started:.0f} s)")
        stop = self.watch.see(step, numbers)
        if stop:
            say(
                f"{self.watch.key} was best at step {self.watch.best_step} ({self.watch.best:.4g}) and no "
                f"better {self.watch.patience} times since; stopping."
            )
        return stop

    def _loss(self, latents: Latents, places: Sequence[int], noise: Tensor, times: Tensor) -> Tensor:
        none = torch.zeros(len(places), dtype=torch.bool)
        draws = Draws(torch.zeros_like(noise), noise, times, none, none, none)
        words = self.reader([self.edits.pairs[place].instruction for place in places])
        batch = EditBatch(
            before=latents.before, mean=latents.mean, std=latents.std, draws=draws, ids=[], **words._asdict()
        )
        device = self.here.accelerator.device
        with torch.no_grad(), self.here.accelerator.autocast():
            predicted, wanted, *_ = self.task.predict(batch.map(lambda tensor: tensor.to(device)))
        return (predicted.float() - wanted).square().mean(dim=(1, 2, 3)).cpu()


# --- the editor that comes out ---


def _write(here: _Setting, output: Path, task: EditTask, data: Data, checks: _Checks | None) -> None:
    """Put the editor into the output folder, its index last: without that it is not a model yet."""
    config, bundle = here.config, here.bundle
    unet, lora = task.unet, None
    if config.lora is not None:
        from ip2p.training.lora import merged, save_lora

        if all(".lora_" in name for name, weight in unet.named_parameters() if weight.requires_grad):
            lora = LORA_FILE
            save_lora(unet, output / lora)
        unet = merged(unet)
    curves = checks.curves if checks is not None else None
    picture = curves.draw() if curves is not None else None
    size = here.transform.size
    card = {
        "name": output.resolve().name,
        "native_size": min(size),
        "base": None if bundle.card.name == "new" else _told(config.base),
        # The drawn pages alone are what the autoencoder of a drawn base keeps that well.
        "known_psnr": bundle.card.known_psnr if here.source.endless else None,
    }
    readme = model_card(
        name=output.resolve().name,
        base=None if bundle.card.name == "new" else config.base,
        data=[data],
        recipe={k: v for k, v in config.as_dict().items() if k not in UNTOLD and v is not None},
        kind=bundle.kind,
        native_size=min(size),
        text_cfg=bundle.card.text_cfg,
        image_cfg=bundle.card.image_cfg,
        curves=curves.rows if curves is not None else (),
        picture="curves.png" if picture else None,
        license=config.license,
        base_license=config.base_license,
        lora=lora,
        notes=here.recipe.notes(bundle),
        distilled=bundle.card.text_cfg_range is not None,
    )
    fresh = output / TRAINING / "editor"
    save_editor(
        bundle,
        fresh,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype],
        unet_state=unet.state_dict(),
        card=card,
        readme=readme,
        files={"curves.png": picture} if picture else {},
    )
    index = output / "model_index.json"
    index.unlink(missing_ok=True)
    for entry in sorted(fresh.iterdir(), key=lambda entry: entry.name == index.name):
        target = output / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    fresh.rmdir()


def _no_check(step: int) -> bool:
    return False


def _told(name: str) -> str:
    """A base as a card for other machines has it: a hub id whole, of a path the last part."""
    return name if not Path(name).expanduser().exists() else Path(name).name
