"""`ip2p train`: trains an editor from pairs and a base model.

The output folder is the editor. Its subfolder `training` has the checkpoints, the log, the validations and
the list of skipped rows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
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
from ip2p.models.compiled import compile_for_training
from ip2p.models.memory import bytes_on, free_bytes
from ip2p.models.save import Data, model_card, save_editor
from ip2p.models.text import Prompt, encode_prompts
from ip2p.settings import EditSettings, Split, first_difference, meta_of, run_json
from ip2p.training.budget import training_memory
from ip2p.training.cache import TextCache, build_cache, encode_pictures, text_key, weights_key
from ip2p.training.curves import Curves
from ip2p.training.loop import FitResult, LoopConfig, fit, new_accelerator
from ip2p.training.loss import Shares
from ip2p.training.objective import EditTask, Objective
from ip2p.training.samples import CachedSamples, PooledSamples, Reader, Share, read_prompts
from ip2p.training.settings import TrainConfig
from ip2p.training.storybook.source import StorybookSource
from ip2p.training.transform import Transform
from ip2p.training.validation import HeldOut, Validation, Watch, held_out

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Unpack

    from ip2p.editing.editor import Editor
    from ip2p.training.arguments import TrainArguments

STORYBOOK = "storybook"
TRAINING = "training"  # subfolder of the output
LORA_FILE = "pytorch_lora_weights.safetensors"
DONE = "done.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Settings that the model card omits.
UNTOLD = ("output", "base", "data", "config", "debug", "cache", "track", "profile", "ray", "seconds", "keep")


class Recipe:
    """The steps of training that distillation replaces (`distill.Distillation`)."""

    name = "train"

    def open(self, config: TrainConfig, device: torch.device) -> Bundle:
        """Load the initial networks, of which the UNet is trained. Raises InputError and ModelError."""
        bundle = open_base(config, device)
        if bundle.card.text_cfg_range is not None:
            raise InputError(
                f"{config.base} is a distilled model, and training would destroy its guidance. Train the "
                "model it was distilled from, then distill the result: ip2p distill."
            )
        return bundle

    def objective(self, config: TrainConfig, prediction: str) -> Objective:
        """The loss, for a UNet that predicts `prediction`."""
        snr_clip = None if config.min_snr is None else (0.0, config.min_snr)
        return Objective(prediction=prediction, shares=shares_of(config), snr_clip=snr_clip)

    def task(
        self, config: TrainConfig, bundle: Bundle, objective: Objective, size: tuple[int, int]
    ) -> EditTask:
        """The module to train, around the bundle's UNet; size: width and height in pixels."""
        return EditTask(
            bundle.unet,
            alpha_bar_from_config(bundle.scheduler_config),
            objective,
            latent_scale=bundle.latent_scale,
            condition_scale=bundle.condition_scale,
        )

    def validation_steps(self, config: TrainConfig) -> int:
        """Sampling steps of the edits in a validation."""
        return config.validate_steps

    def notes(self, bundle: Bundle) -> str:
        """A paragraph for the README, or ""."""
        return ""


def shares_of(config: TrainConfig) -> Shares:
    """The shares of samples that drop their text, their picture, or both."""
    return Shares(config.text_null, config.image_null, config.both_null)


def train(config: TrainConfig | None = None, **changes: Unpack[TrainArguments]) -> Path:
    """Train an editor, or resume, and return its folder. config, changes: the settings, see `TrainConfig`.

    `train(data="pairs", base="timbrooks/instruct-pix2pix", output="editor", steps=1000)`. Raises InputError,
    ModelError and ResourceError.
    """
    return start((config or TrainConfig()).changed(**changes), Recipe)


def start(config: TrainConfig, recipe: type[Recipe]) -> Path:
    """Train in this process or on a Ray cluster; returns the output folder. Raises as `run_training` does."""
    config.check()
    output = Path(str(config.output))
    if config.ray is not None:
        from ip2p.training.ray import launch

        make_folder(output)
        launch(
            partial(run_training, recipe=recipe),
            config.changed(ray=None),
            workers=config.ray,
            storage=output / TRAINING / "ray",
            use_gpu=False if config.device == "cpu" else None,
        )
    else:
        run_training(config, recipe)
    return output


def run_training(config: TrainConfig, recipe: type[Recipe] = Recipe) -> FitResult | None:
    """Train in this process, which may be one of several; None if the run was already finished.

    Raises InputError, ModelError and ResourceError as `fit`, `build_cache` and `load_base` do.
    """
    assert config.output is not None, "TrainConfig.check was called"
    folder = Path(config.output)
    make_folder(folder)
    with lock_folder(folder) if is_main_process() else contextlib.nullcontext():
        if (message := _finished(config, folder)) is not None:
            if is_main_process():
                say(message)
            return None
        with translated_errors(memory=f"out of memory; try {_memory_advice(config)}."):
            return _train(config, folder, recipe())


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _finished(config: TrainConfig, folder: Path) -> str | None:
    """The message for a run that is finished, or None. Raises InputError if its settings have changed."""
    try:
        done = json.loads((folder / TRAINING / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not (folder / "model_index.json").exists():
        return None
    difference = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
        difference = first_difference(config, before)
    if difference is not None:
        flag, old, new = difference
        raise InputError(
            f"{folder} was trained with {flag} {old}, but it is now {new}; use the same value, or choose "
            "another folder with --output."
        )
    if done["step"] >= config.steps:
        return f"{folder} is finished: {done['step']} steps. Increase --steps to continue training."
    if done["stopped_early"] and done["asked"] == config.steps:
        return f"{folder} is finished: it stopped improving and ended at step {done['step']}."
    return None


@dataclass(frozen=True)
class _Context:
    """What the parts of a run share."""

    config: TrainConfig
    recipe: Recipe
    folder: Path  # for checkpoints and logs
    accelerator: Accelerator
    bundle: Bundle
    source: Source
    transform: Transform
    objective: Objective
    share: Share

    @property
    def autocast(self) -> torch.dtype | None:
        return DTYPES.get(self.accelerator.mixed_precision)

    def encode_texts(self, texts: list[str]) -> Prompt:
        return encode_prompts(self.bundle, texts, self.transform.size)


def _train(config: TrainConfig, output: Path, recipe: Recipe) -> FitResult:
    started = time.monotonic()
    # 1. The networks, the data and the loss.
    accelerator = _accelerator(config, output / TRAINING)
    main = accelerator.is_main_process
    bundle = recipe.open(config, accelerator.device)
    if config.prediction != "auto":
        # The editor's scheduler must say it as well, or the editor would be sampled incorrectly.
        scheduler = {**bundle.scheduler_config, "prediction_type": config.prediction}
        bundle = replace(bundle, scheduler_config=scheduler)
    size = _size(config, bundle)
    source = find_source(
        config.data,
        size[0] if size[0] == size[1] else None,
        seed=config.seed,
        split=config.split,
        stream=config.stream,
        revision=config.data_revision,
        columns=config.columns,
    )
    context = _Context(
        config=config,
        recipe=recipe,
        folder=output / TRAINING,
        accelerator=accelerator,
        bundle=bundle,
        source=source,
        transform=Transform(
            size=size, resize_to=config.resize_to, flip=not (config.no_flip or source.endless)
        ),
        objective=_objective(config, recipe, bundle),
        share=Share(
            batch=config.batch,
            micro=config.micro_batch or max(1, config.batch // accelerator.num_processes),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        ),
    )
    context.folder.mkdir(parents=True, exist_ok=True)

    # 2. The module to train, its samples and its validation.
    start_key = weights_key(bundle.unet)
    task = _task(context)
    _check_memory(context)
    samples, read_texts, held, data = _samples(context)
    if config.stop_when_worse and not held:
        raise InputError(
            f"--stop-when-worse needs held-out pairs, at most a tenth of all, but {config.data} has "
            f"{data.rows} rows; remove the flag, or use more data."
        )
    validation = _validation(context, task, read_texts, held) if main and held else None
    if main:
        write_text(output / "run.json", run_json(config))

    # 3. Training.
    names = {field.name for field in fields(LoopConfig)} & type(config).model_fields.keys()
    shared = {name: getattr(config, name) for name in names}
    result = fit(
        task,
        samples,
        LoopConfig(**shared | {"validate_every": config.validate_every if held else 0}),
        folder=context.folder,
        accelerator=accelerator,
        fingerprint=fingerprint(config, source, start_key),
        name=recipe.name,
        deadline=None if config.seconds is None else started + config.seconds,
        validation=validation,
        say=say if main else lambda text: None,
    )

    # 4. The editor.
    if main and result.finished:
        if validation is not None and not result.stopped_early:
            validation(result.step)
        _write(context, output, task, data, validation.curves if validation is not None else None)
        done = {"step": result.step, "stopped_early": result.stopped_early, "asked": config.steps}
        write_text(context.folder / DONE, json.dumps(done) + "\n")
    elif main:
        say("the time limit is reached; run the same command again to resume")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def fingerprint(config: TrainConfig, source: Source, start: str) -> dict[str, Any]:
    """What must not change on resume: the settings that affect the result, the data and the base."""
    fields = type(config).model_fields
    kept = {name: value for name, value in config.as_dict().items() if meta_of(fields[name]).same_job}
    if config.schedule == "cosine":
        kept["steps"] = config.steps  # the learning rate depends on it
    if config.optimizer == "adamw":
        kept.pop("optimizer")  # checkpoints of earlier versions do not have it
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    return kept | {"content of --data": source.key, "weights of --base": start}


# --- the parts ---


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    device = pick_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type in ("cuda", "cpu") and has_fast_bf16(device) else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA, but the device is {device.type}; use bf16 or fp32.")
    mixed = "no" if precision == "fp32" else precision
    tracker = _trackers(config.track)
    if tracker is None:
        return new_accelerator(device, mixed)
    accelerator = new_accelerator(device, mixed, log_with=tracker, project_dir=str(folder))
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.as_dict().items()}
    accelerator.init_trackers(tracker, config=settings)
    return accelerator


def _trackers(track: str) -> str | None:
    if track == "none":
        return None
    installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if track == "auto":
        return "tensorboard" if installed else None
    if track == "tensorboard" and not installed:
        raise InputError("--track tensorboard needs TensorBoard: pip install 'ip2p[track]'")
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    if track not in known:
        raise InputError(f"--track is {track!r}; choose one of: auto, none, {', '.join(known)}.")
    if track != "tensorboard" and not importlib.util.find_spec(track):
        raise InputError(f"--track {track} needs the package: pip install {track}")
    return track


def _size(config: TrainConfig, bundle: Bundle) -> tuple[int, int]:
    """Width and height in pixels. Raises InputError for a size that the model cannot take."""
    side = config.size or bundle.card.native_size
    size = (side, side) if isinstance(side, int) else side
    for name, pixels in zip(("width", "height"), size, strict=True):
        if pixels % bundle.size_multiple:
            fits = max(1, round(pixels / bundle.size_multiple)) * bundle.size_multiple
            raise InputError(
                f"--size: the {name} of {pixels} pixels is not a multiple of {bundle.size_multiple}, which "
                f"this model requires. Try {fits}."
            )
    return size


def _objective(config: TrainConfig, recipe: Recipe, bundle: Bundle) -> Objective:
    objective = recipe.objective(config, prediction_of(bundle))
    if config.min_snr is not None and alpha_bar_from_config(bundle.scheduler_config)[-1] < 1e-6:
        if objective.prediction == "epsilon":
            raise InputError(
                "--min-snr divides by the signal-to-noise ratio, which is 0 at this base's last noise level; "
                "remove it, or use --prediction v_prediction."
            )
        say(
            "warning: this base's last noise level has no signal, so --min-snr gives it a weight of 0 for "
            "velocity"
        )
    return objective


def open_base(config: TrainConfig, device: torch.device) -> Bundle:
    """The initial networks. The config of a UNet, with --parts-from, gives a randomly initialized UNet."""
    path = Path(config.base).expanduser()
    is_config = path.suffix == ".json" and path.is_file()
    if path.is_dir() and not (path / "model_index.json").exists():
        is_config = (path / "config.json").is_file() and not any(path.glob("diffusion_pytorch_model*"))
    if not is_config:
        return load_pretrained(config, device)
    if config.parts_from is None:
        raise InputError(
            f"{config.base} is only the config of a UNet; add --parts-from MODEL, which provides the "
            "autoencoder, the text encoder and the noise schedule."
        )
    return new_from_config(
        path, config.parts_from, device=device, revision=config.revision, vae=config.vae, seed=config.seed
    )


def load_pretrained(config: TrainConfig, device: torch.device) -> Bundle:
    """`load_base` with the settings of a run."""
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
    """Open the data set `data`; `storybook` is drawn on the fly, `side` pixels wide and high."""
    if data != STORYBOOK or Path(STORYBOOK).exists():
        return open_source(data, stream=stream, revision=revision, split=split, columns=columns)
    if columns:
        raise InputError("the storybook is drawn and has no columns; remove --columns.")
    if side is None:
        raise InputError("storybook pages are square; use a single number, for example --size 256.")
    if split not in typing.get_args(Split):
        raise InputError(
            f"the storybook has no split {split!r}; choose one of: {', '.join(typing.get_args(Split))}."
        )
    return StorybookSource(side, seed=seed, split=typing.cast(Split, split))


def cache_home(config: TrainConfig) -> Path:
    if config.cache is not None:
        return config.cache
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ip2p"


def _task(context: _Context) -> EditTask:
    config, bundle, size = context.config, context.bundle, context.transform.size
    device, unet = context.accelerator.device, context.bundle.unet
    if device.type == "cpu" and size[0] * size[1] // bundle.latent_factor**2 <= 256:
        from diffusers.models.attention_processor import AttnProcessor

        # On a CPU, the backward pass of fused attention is slower for so few latent cells.
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
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = True
    if config.compile:
        compile_for_training(unet, device)
    return context.recipe.task(config, bundle, context.objective, size)


def _check_memory(context: _Context) -> None:
    """Print the memory that the run needs. Raises ResourceError if it cannot fit."""
    config, bundle, device = context.config, context.bundle, context.accelerator.device
    networks = [bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2]
    parts = [part for part in networks if part is not None]
    width, height = context.transform.size
    need = training_memory(
        bundle.unet,
        parts[1:],
        micro_batch=context.share.micro,
        latent_size=(height // bundle.latent_factor, width // bundle.latent_factor),
        optimizer=config.optimizer,
        ema=bool(config.ema) and not (config.ema_on_cpu and device.type != "cpu"),
        half=context.autocast is not None,
        checkpointing=config.checkpointing,
    )
    need = replace(need, loaded=bytes_on([parts], device))
    free = free_bytes(device)
    warning = need.check(str(device), free, _memory_advice(config))
    if context.accelerator.is_main_process:
        say(need.line(str(device), free))
        if warning is not None:
            say(warning)


def _memory_advice(config: TrainConfig) -> str:
    """The settings that would reduce the run's memory."""
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


# --- samples ---


def _samples(context: _Context) -> tuple[CachedSamples | PooledSamples, Reader, list[Pair], Data]:
    """The samples, the reader of their texts, the held-out pairs, and the data as the card lists them."""
    config, source, bundle = context.config, context.source, context.bundle
    if config.no_cache or config.stream or source.endless:
        return _uncached_samples(context)
    folder = cache_home(config)
    make_folder(folder)
    shared: dict[str, Any] = {
        "rank": context.share.rank,
        "world": context.share.world,
        "dtype": config.cache_dtype,
    }
    cache = build_cache(
        source,
        bundle,
        context.transform,
        folder / "latents",
        autocast=context.autocast,
        workers=config.workers,
        **shared,
    )
    texts = TextCache.build(
        ["", *cache.instructions],
        context.encode_texts,
        folder / "texts",
        key=text_key(bundle, context.transform.size),
        **shared,
    )
    held, kept = _apart(config, cache.prompts)
    read_texts = read_prompts(lambda chosen: texts.read(texts.places(chosen)))
    samples = CachedSamples(
        cache,
        read_texts,
        context.transform,
        context.objective,
        context.share,
        seed=config.seed,
        kept=kept,
        ahead=context.accelerator.device.type != "cpu",
    )
    data = Data(name=config.data, rows=len(kept), quarantined=len(cache.broken), license=config.data_license)
    return samples, read_texts, [source[cache.rows[place]] for place in held], data


def _apart(config: TrainConfig, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """The rows to hold out, one of each held-out prompt, and the rows of all other prompts."""
    first: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        first.setdefault(prompt, place)
    names = list(first)
    count = min(config.held_out, len(names) // 10) if config.validate_every else 0
    out = {names[k] for k in held_out(names, count, config.seed)}
    held = [place for prompt, place in first.items() if prompt in out]
    return held, [place for place, prompt in enumerate(prompts) if prompt not in out]


def _uncached_samples(context: _Context) -> tuple[PooledSamples, Reader, list[Pair], Data]:
    config, source, bundle = context.config, context.source, context.bundle

    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [encode_pictures(bundle.vae, some, autocast=context.autocast) for some in pixels.split(16)]
        mean, std = (torch.cat(values).contiguous() for values in zip(*parts, strict=True))
        return mean, std

    kept: list[int] | None = None
    if source.endless:
        count = config.held_out if config.validate_every else 0
        test = StorybookSource(context.transform.size[0], seed=config.seed, split="test", count=max(1, count))
        pairs = [test[row] for row in range(count)]
    else:
        prompts = getattr(source, "prompts", None)
        if prompts is None:  # finding them would mean reading all rows first
            say("without a cache, pairs are sampled and held out individually, not by prompt")
        held, kept = _apart(config, prompts or [str(row) for row in range(len(source))])
        pairs = [source[row] for row in held]
    bundle.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    read_texts = read_prompts(memoized(context.encode_texts))
    samples = PooledSamples(
        source,
        read_texts,
        context.transform,
        encode,
        context.objective,
        context.share,
        seed=config.seed,
        # A short run needs no full pool.
        pool=min(config.pool, -(-config.steps * config.batch // config.reuse)),
        reuse=config.reuse,
        workers=config.workers,
        kept=kept,
        quarantine=context.folder / "quarantine.jsonl" if context.share.rank == 0 else None,
    )
    rows = None if kept is None else len(kept)
    return samples, read_texts, pairs, Data(name=config.data, rows=rows, license=config.data_license)


def memoized(encode: Callable[[list[str]], Prompt], limit: int = 20_000) -> Callable[[list[str]], Prompt]:
    """An `encode` that keeps up to `limit` encoded texts on the CPU, since texts repeat, "" most of all."""
    known: dict[str, tuple[Tensor | None, ...]] = {}

    @torch.no_grad()
    def read(texts: list[str]) -> Prompt:
        if len(known) > limit:
            known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            prompt = encode(new)
            for k, text in enumerate(new):
                known[text] = tuple(None if x is None else x[k].cpu() for x in vars(prompt).values())
        rows = zip(*(known[text] for text in texts), strict=True)
        columns: Any = (None if column[0] is None else torch.stack(column) for column in rows)
        return Prompt(*columns)

    return read


# --- validation ---


def _validation(context: _Context, task: EditTask, read_texts: Reader, pairs: Sequence[Pair]) -> Validation:
    config, bundle, accelerator = context.config, context.bundle, context.accelerator
    steps = context.recipe.validation_steps(config)
    drawn = isinstance(context.source, StorybookSource)
    clip = None
    if config.clip is not None or (bundle.folder / "clip" / "config.json").is_file():
        clip = Clip.load(find_clip(config.clip, str(bundle.folder)), accelerator.device)

    def storybook_score(editor: Editor) -> dict[str, float]:
        overall = score(
            editor,
            count=4 * len(edits.pairs),
            seed=config.seed,
            settings=EditSettings(steps=steps),
            size=context.transform.size[0],
            splits=("test",),
            baselines=(),
        )["splits"]["test"]["model"]["overall"]
        kept = overall["preservation"]
        return {"success": overall["nearest"]["value"], "kept": kept["value"] if kept else 0.0}

    edits = HeldOut(
        pairs,
        context.folder,
        context.transform.size,
        settings={"steps": steps},
        clip=clip,
        score=storybook_score if drawn else None,
    )
    key = config.watch
    if key == "auto":
        key = "success" if drawn else "clip_directional" if clip is not None else "loss"
    watch = Watch(key, config.stop_when_worse or 0, higher_is_better=key not in ("loss", "l1"))
    return Validation(edits, watch, task, bundle, read_texts, accelerator, context.autocast)


# --- the output ---


def _write(context: _Context, output: Path, task: EditTask, data: Data, curves: Curves | None) -> None:
    """Write the editor into the output folder; its index is last, and without it there is no model yet."""
    config, bundle = context.config, context.bundle
    unet, lora = task.unet, None
    if config.lora is not None:
        from ip2p.training.lora import merged, save_lora

        if all(".lora_" in name for name, weight in unet.named_parameters() if weight.requires_grad):
            lora = LORA_FILE
            save_lora(unet, output / lora)
        unet = merged(unet)
    picture = curves.draw() if curves is not None else None
    base = None if bundle.card.name == "new" else config.base
    native_size = min(context.transform.size)
    card = {
        "name": output.resolve().name,
        "native_size": native_size,
        # A local path means nothing on other machines.
        "base": Path(base).name if base is not None and Path(base).expanduser().exists() else base,
        # The autoencoder of a storybook base reaches it for drawn pages only.
        "known_psnr": bundle.card.known_psnr if context.source.endless else None,
    }
    readme = model_card(
        name=output.resolve().name,
        base=base,
        data=[data],
        recipe={k: v for k, v in config.as_dict().items() if k not in UNTOLD and v is not None},
        kind=bundle.kind,
        native_size=native_size,
        text_cfg=bundle.card.text_cfg,
        image_cfg=bundle.card.image_cfg,
        curves=curves.rows if curves is not None else (),
        picture="curves.png" if picture else None,
        license=config.license,
        base_license=config.base_license,
        lora=lora,
        notes=context.recipe.notes(bundle),
        distilled=bundle.card.text_cfg_range is not None,
    )
    made = output / TRAINING / "editor"
    save_editor(
        bundle,
        made,
        dtype=DTYPES[config.dtype],
        unet_state=unet.state_dict(),
        card=card,
        readme=readme,
        files={"curves.png": picture} if picture else {},
    )
    index = output / "model_index.json"
    index.unlink(missing_ok=True)
    for entry in sorted(made.iterdir(), key=lambda entry: entry.name == index.name):
        target = output / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    made.rmdir()
