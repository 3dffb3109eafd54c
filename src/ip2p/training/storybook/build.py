"""Train the storybook models from nothing: `ip2p storybook build --preset smoke|cpu|h100`.

The stages follow one another; every preset is this one recipe with other numbers. A stage saves its state,
stops in time, and continues from where it stopped.

1. `encoder`, `decoder`: the autoencoder (`autoencoder`).
2. `text`: the tokenizer and the text encoder (`text`).
3. `clip`: a CLIP that ranks and filters (`clip`).
4. `perception`, `unet`, `decay`: the editor (`editor`). It needs the encoder, not the decoder.
5. `lm`: the language model that writes edits of captions (`language_model`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.base.ledger import lock_folder
from ip2p.models.save import edit_scheduler, write_editor
from ip2p.synth.instruct import PACKAGED_LM
from ip2p.synth.tune import CARD as LM_CARD
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loss import BETA_END, BETA_START, TIMESTEPS
from ip2p.training.storybook.autoencoder import train_decoder, write_encoder
from ip2p.training.storybook.clip import train_clip
from ip2p.training.storybook.editor import new_unet, train_decay, train_perception, train_unet
from ip2p.training.storybook.language_model import train_lm
from ip2p.training.storybook.presets import PRESETS
from ip2p.training.storybook.stage import SUMMARY, OutOfTime, Run
from ip2p.training.storybook.text import train_text

TRAINERS: dict[str, Callable[[Run], None]] = {
    "encoder": write_encoder,
    "decoder": train_decoder,
    "text": train_text,
    "clip": train_clip,
    "perception": train_perception,
    "unet": train_unet,
    "decay": train_decay,
    "lm": train_lm,
}
STAGES = tuple(TRAINERS)
EDITOR = ("unet", "text_encoder")  # the networks that `decay` writes


def run(
    preset_name: str,
    output: str | os.PathLike[str],
    *,
    seconds: float | None = None,
    stage: str = "all",
    device: str = "auto",
    steps: int | None = None,
    minutes: float | None = None,
    start: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] | None = None,
) -> bool:
    """Build, or continue a build. True when all requested stages are finished, False when the time ran out.

    `seconds` is the time of this call alone; `steps` caps every stage's steps (for tests of a large preset).
    `minutes` replaces the length of stage `stage` (perception, unet or decay), which continues if it had
    finished before; `decay` always starts again from the newest state of `unet`, finished or not.
    `start` names a trained bundle of the same preset whose UNet is trained further (`start_from`).
    `bundle` receives the half-precision folder as it is at the end of the call, finished or not.
    """
    from ip2p.base.devices import pick_device

    if preset_name not in PRESETS:
        raise InputError(f"unknown preset {preset_name!r}; choose one of: {', '.join(PRESETS)}")
    if stage not in ("all", *STAGES):
        raise InputError(f"unknown stage {stage!r}; choose one of: all, {', '.join(STAGES)}")
    started = time.monotonic()
    preset = PRESETS[preset_name]
    if minutes is not None:
        if stage not in ("perception", "unet", "decay"):
            raise InputError("--minutes sets the length of one stage: add --stage perception, unet or decay")
        preset = replace(preset, **{stage: replace(getattr(preset, stage), minutes=minutes)})
        if stage == "perception":
            preset = replace(preset, perception_most=minutes)
    if steps is not None:
        limited = ("decoder", "decoder_pages", "text", "perception", "unet", "decay", "clip", "lm")
        shorter = {name: replace(getattr(preset, name), steps=steps) for name in limited}
        # A few steps need few pages.
        pool = replace(preset.pool, fresh=1, pool=1) if steps < 64 else preset.pool
        preset = replace(preset, pool=pool, **shorter)
    here = Run(
        preset=preset,
        name=preset_name,
        output=Path(output),
        device=torch.device(pick_device(device)),
        deadline=None if seconds is None else started + seconds,
        log=log or (lambda text: print(text, file=sys.stderr, flush=True)),
    )
    here.output.mkdir(parents=True, exist_ok=True)
    if here.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    finished = True
    with lock_folder(here.output):
        if start is not None:
            start_from(here, start)
        for name, train in TRAINERS.items():
            if stage not in ("all", name):
                continue
            if here.is_done(name) and not _goes_on(here, name, minutes):
                here.log(f"{name}: finished already")
                continue
            try:
                train(here)
            except OutOfTime:
                here.log(f"{name}: time is up; the same command continues from here")
                finished = False
                break
        if bundle is not None and (here.output / "clip").exists():
            with contextlib.suppress(InputError):
                save_bundle(here.output, Path(bundle), name=preset_name, card=card(here), dtype=torch.float16)
    return finished


def _goes_on(run: Run, stage: str, minutes: float | None) -> bool:
    """Whether a finished stage has more to do: more minutes, or a longer `unet` to decay from."""
    if minutes is not None:
        return True
    if stage != "decay":
        return False
    state = Checkpoints(run.state_dir / "unet").rows()
    return bool(state) and state[-1]["step"] != run.summary("decay").get("steps_before")


# --- starting from a model that is there ---


def start_from(run: Run, model: str) -> None:
    """Put a trained bundle's parts into a new build, so that its UNet is trained further.

    All stages before `unet` count as finished, and so does its language model, if it has one.
    Raises InputError when the build has begun already, ModelError when the model has other numbers than
    the preset.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from ip2p.models.bundle import find_model

    folder = find_model(model)
    started = run.output / "start"
    if not started.exists() and run.state_dir.exists():
        raise InputError(f"{run.output} holds a build already; --start needs a new folder: --out OTHER")
    if not started.exists():
        try:
            made = json.loads((folder / "ip2p.json").read_text())
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        except OSError as error:
            raise ModelError(
                f"{folder} was not made by ip2p storybook build: {error.filename} is missing"
            ) from None
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
        shapes = {key: value.shape for key, value in new_unet(run.preset).state_dict().items()}
        if (
            {key: value.shape for key, value in unet.state_dict().items()} != shapes
            or made["native_size"] != run.preset.size
            or scheduler.get("prediction_type", "epsilon") != run.preset.prediction
        ):
            raise ModelError(
                f"{model} was built with preset {made.get('preset')!r} at {made['native_size']} px and does "
                f"not fit preset {run.name!r}; train it further with its own preset"
            )
        AutoencoderKL.from_pretrained(folder / "vae").float().save_pretrained(run.output / "vae")
        CLIPModel.from_pretrained(folder / "clip").float().save_pretrained(run.output / "clip")
        text = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
        text.save_pretrained(run.output / "text_tower")
        CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(run.output / "tokenizer")
        for stage in ("encoder", "decoder", "text", "clip"):
            known = {"known_psnr": made.get("known_psnr")} if stage == "decoder" else {}
            run.finish(stage, {**made["trained"].get(stage, {}), **known})
        run.finish("perception", {"measured": made["trained"].get("perception", {})})
        run.finish("start", {"unet": made["trained"].get("unet")})
        unet.save_pretrained(started / "unet")
        _take_lm(run, folder)
    # It sees new pages each time that it is trained further.
    before = run.summary("start").get("unet") or {}
    run.seed_shift = 1000 + int(before.get("steps", 0))


def _take_lm(run: Run, folder: Path) -> None:
    """Count a model's language model as finished, if it has one."""
    if (folder / PACKAGED_LM).is_dir():
        shutil.copytree(folder / PACKAGED_LM, run.output / PACKAGED_LM)
        run.finish("lm", _lm_summary(folder / PACKAGED_LM))


def _lm_summary(folder: Path) -> dict[str, Any]:
    """How long a language model was trained, as its folder says."""
    recorded = json.loads((folder / LM_CARD).read_text())
    return {key: recorded[key] for key in SUMMARY if key in recorded}


# --- putting it together ------------------------------------------------------------------------


def save_bundle(source: Path, target: Path, *, name: str, card: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the trained parts as one diffusers folder in half precision, in shards under 16 MiB.

    Without a finished decay, the editor is the moving average of the newest state. Raises InputError when
    there is none.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {}  # that other hands wrote, or an earlier build
    if (target / "README.md").exists():
        kept["README.md"] = target / "README.md"
    lm = next((folder / PACKAGED_LM for folder in (source, target) if (folder / PACKAGED_LM).is_dir()), None)
    if lm is not None:
        kept[PACKAGED_LM] = lm
        card = {**card, "trained": {**card.get("trained", {}), "lm": _lm_summary(lm)}}
    write_editor(
        target,
        {
            **_editor_networks(source),
            "vae": AutoencoderKL.from_pretrained(source / "vae"),
            "clip": CLIPModel.from_pretrained(source / "clip"),
        },
        {"tokenizer": CLIPTokenizer.from_pretrained(source / "tokenizer")},
        edit_scheduler(
            {
                "beta_start": BETA_START,
                "beta_end": BETA_END,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": TIMESTEPS,
                "prediction_type": PRESETS[name].prediction,
            }
        ),
        dtype=dtype,
        card=card,
        shard=15_000_000,
        files=kept,
    )


def _editor_networks(source: Path) -> dict[str, Any]:
    """The finished UNet and text encoder, or else the averages of the newest `unet` or `perception` state."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    if all((source / part).exists() for part in EDITOR):
        return {
            "unet": UNet2DConditionModel.from_pretrained(source / "unet"),
            "text_encoder": CLIPTextModel.from_pretrained(source / "text_encoder"),
        }
    states = (Checkpoints(source / "state" / stage).load() for stage in ("unet", "perception"))
    state = next((found for found in states if found is not None), None)
    if state is None:
        raise InputError(f"{source} holds no trained UNet yet; run: ip2p storybook build --out {source}")
    fingerprint = state["fingerprint"]
    shape = {key: _hashable(fingerprint[key]) for key in SHAPE}
    preset = replace(PRESETS[fingerprint["preset"]], **shape)
    networks = {
        "unet": new_unet(preset),
        "text_encoder": CLIPTextModel.from_pretrained(source / "text_tower"),
    }
    average = state["ema"]["average"]
    for part, network in networks.items():
        prefix = f"{part}."
        own = {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}
        network.load_state_dict(own)
    return networks


SHAPE = ("size", "unet_channels", "unet_layers", "fine_attention", "heads", "text_width", "latent_channels")


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def card(run: Run) -> dict[str, Any]:
    """What the model is and how it was made, as `ip2p.json` beside the weights.

    An unfinished UNet counts as far as it went; one that started from a trained model adds to that one's
    numbers.
    """
    made = {
        stage: {key: summary[key] for key in SUMMARY if key in summary}
        for stage in STAGES
        if (summary := run.summary(stage))
    }
    if run.summary("perception"):
        made["perception"] |= run.summary("perception").get("measured", {})
    if "unet" not in made and (state := Checkpoints(run.state_dir / "unet").load()) is not None:
        made["unet"] = {
            "steps": state["step"],
            "samples": state["samples"],
            "minutes": round(state["seconds"] / 60, 1),
        }
    before = run.summary("start").get("unet")
    if before:
        now = made.get("unet", dict.fromkeys(SUMMARY, 0))
        made["unet"] = {key: round(now[key] + before[key], 1) for key in SUMMARY}
    return {
        "name": "storybook",
        "native_size": run.preset.size,
        "known_psnr": run.summary("decoder").get("known_psnr"),
        "closed_vocabulary": True,
        "preset": run.name,
        "trained": made,
    }
