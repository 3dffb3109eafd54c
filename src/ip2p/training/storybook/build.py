"""Trains the storybook models from scratch: `ip2p storybook build --preset smoke|cpu|h100`.

The stages run in order, and every preset is the same recipe with other numbers. A stage saves its state when
the time is up, and the next call resumes it.

1. `encoder`, `decoder`: the autoencoder (`autoencoder`).
2. `text`: the tokenizer and the text encoder (`text`).
3. `clip`: a CLIP for ranking and filtering (`clip`).
4. `perception`, `unet`, `decay`: the editor (`editor`). It needs the encoder but not the decoder.
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
from ip2p.models.bundle import RECOMMENDED
from ip2p.models.save import edit_scheduler, write_editor
from ip2p.synth.instruct import PACKAGED_LM
from ip2p.synth.tune import CARD as LM_CARD
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loss import BETA_END, BETA_START, TIMESTEPS
from ip2p.training.storybook.autoencoder import train_decoder, write_encoder
from ip2p.training.storybook.clip import train_clip
from ip2p.training.storybook.editor import new_unet, train_decay, train_perception, train_unet
from ip2p.training.storybook.language_model import train_lm
from ip2p.training.storybook.presets import PRESETS, Preset
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
LENGTHS = ("decoder", "perception", "unet", "decay")  # stages that take --minutes


def build_model(
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
    """Build, or resume. True if all requested stages are finished, False if the time ran out.

    seconds: time limit of this call. steps: maximum steps of each stage, to test a large preset. minutes:
    replaces the length of `stage` (one of `LENGTHS`) and continues it if it was finished; `decay` always
    starts again from the newest state of `unet`, and the decoder's part on whole pages from that on crops.
    start: a trained bundle whose UNet or decoder is trained further (`start_from`). bundle: folder for the
    half-precision model at the end of the call, finished or not.
    """
    from ip2p.base.devices import pick_device

    if preset_name not in PRESETS:
        raise InputError(f"unknown preset {preset_name!r}; choose one of: {', '.join(PRESETS)}")
    if stage not in ("all", *STAGES):
        raise InputError(f"unknown stage {stage!r}; choose one of: all, {', '.join(STAGES)}")
    started = time.monotonic()
    preset = PRESETS[preset_name]
    if minutes is not None:
        if stage not in LENGTHS:
            raise InputError(
                f"--minutes sets the length of one stage; add --stage with one of: {', '.join(LENGTHS)}"
            )
        preset = replace(preset, **{stage: replace(getattr(preset, stage), minutes=minutes)})
        if stage == "perception":
            preset = replace(preset, perception_most=minutes)
    if steps is not None:
        limited = ("decoder", "decoder_pages", "text", "perception", "unet", "decay", "clip", "lm")
        shorter = {name: replace(getattr(preset, name), steps=steps) for name in limited}
        # Few steps need few pages.
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
        if (here.output / "start").exists():
            here.preset = started_preset(here)
            # New pages each time that the model is trained further.
            here.seed_shift = 1000 + int((here.summary("start").get("unet") or {}).get("steps", 0))
        for name, train in TRAINERS.items():
            if stage not in ("all", name):
                continue
            if here.is_done(name) and not _goes_on(here, name, minutes):
                here.log(f"{name}: finished already")
                continue
            try:
                train(here)
            except OutOfTime:
                here.log(f"{name}: the time limit is reached; run the same command again to resume")
                finished = False
                break
        if bundle is not None and (here.output / "clip").exists():
            with contextlib.suppress(InputError):
                save_bundle(here.output, Path(bundle), here.preset, card=card(here), dtype=torch.float16)
    return finished


def _goes_on(run: Run, stage: str, minutes: float | None) -> bool:
    """Whether a finished stage has more to do: more minutes, or a longer `unet` before `decay`."""
    if minutes is not None:
        return True
    if stage != "decay":
        return False
    state = Checkpoints(run.state_dir / "unet").rows()
    return bool(state) and state[-1]["step"] != run.summary("decay").get("steps_before")


# --- starting from a trained model ---


def start_from(run: Run, model: str) -> None:
    """Copy the networks of a trained storybook model into a new build, which trains its UNet further.

    The stages before `unet` count as finished, as does the language model if there is one. Raises InputError
    if the folder has another build, and ModelError for a model that is not a storybook model.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from ip2p.models.bundle import find_model

    folder = find_model(model)
    if (run.output / "start").exists():
        return
    if run.state_dir.exists():
        raise InputError(f"{run.output} holds a build already; --start needs a new folder: --out OTHER")
    try:
        made = json.loads((folder / "ip2p.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        trained, native_size = made["trained"], made["native_size"]
    except (OSError, KeyError) as error:
        missing = error.filename if isinstance(error, OSError) else error
        raise ModelError(f"{folder} was not made by ip2p storybook build: {missing} is missing") from None
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    AutoencoderKL.from_pretrained(folder / "vae").float().save_pretrained(run.output / "vae")
    CLIPModel.from_pretrained(folder / "clip").float().save_pretrained(run.output / "clip")
    for file in _clip_tokenizer(folder):
        shutil.copyfile(file, run.output / "clip" / file.name)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    text.save_pretrained(run.output / "text_tower")
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(run.output / "tokenizer")
    for stage in ("encoder", "decoder", "text", "clip"):
        known = {"known_psnr": made.get("known_psnr")} if stage == "decoder" else {}
        run.finish(stage, {**trained.get(stage, {}), **known})
    run.finish("perception", {"measured": trained.get("perception", {})})
    run.finish(
        "start",
        {
            "unet": trained.get("unet"),
            "decoder": trained.get("decoder"),
            "size": native_size,
            "prediction": scheduler.get("prediction_type", "epsilon"),
            "recommended": {key: made[key] for key in RECOMMENDED if key in made},
        },
    )
    _take_lm(run, folder)
    unet.save_pretrained(run.output / "start" / "unet")


def started_preset(run: Run) -> Preset:
    """The run's preset with the networks of the model that the build started from."""
    unet, vae, text = (
        json.loads((run.output / part / "config.json").read_text())
        for part in ("start/unet", "vae", "text_tower")
    )
    start = run.summary("start")
    preset = replace(
        run.preset,
        size=start.get("size", run.preset.size),
        prediction=start.get("prediction", run.preset.prediction),
        vae_channels=tuple(vae["block_out_channels"]),
        latent_channels=vae["latent_channels"],
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        unet_channels=tuple(unet["block_out_channels"]),
        unet_layers=_hashable(unet["layers_per_block"]),
        unet_groups=unet["norm_num_groups"],
        fine_attention=unet["up_block_types"][-1].startswith("CrossAttn"),
        heads=_hashable(unet["attention_head_dim"]),
    )
    made = dict(new_unet(preset).config)
    if odd := [key for key in ("down_block_types", "up_block_types") if list(made[key]) != unet[key]]:
        raise ModelError(f"{run.output / 'start'}: the UNet's {odd[0]} are not those of a storybook model")
    return preset


def _take_lm(run: Run, folder: Path) -> None:
    """Copy the language model of a model, if it has one, and mark its stage as finished."""
    if (folder / PACKAGED_LM).is_dir():
        shutil.copytree(folder / PACKAGED_LM, run.output / PACKAGED_LM)
        run.finish("lm", _lm_summary(folder / PACKAGED_LM))


def _lm_summary(folder: Path) -> dict[str, Any]:
    """How long a language model was trained, from its card."""
    recorded = json.loads((folder / LM_CARD).read_text())
    return {key: recorded[key] for key in SUMMARY if key in recorded}


# --- the output ---------------------------------------------------------------------------------


def save_bundle(
    source: Path, target: Path, preset: Preset, *, card: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write the trained networks as one diffusers folder, in files of less than 16 MiB.

    Without a finished decay, the editor has the EMA weights of the newest state. Raises InputError if there
    are none.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {}  # files of an earlier build, or written by hand
    if (target / "README.md").exists():
        kept["README.md"] = target / "README.md"
    kept |= {f"clip/{file.name}": file for file in _clip_tokenizer(source)}
    lm = next((folder / PACKAGED_LM for folder in (source, target) if (folder / PACKAGED_LM).is_dir()), None)
    if lm is not None:
        kept[PACKAGED_LM] = lm
        card = {**card, "trained": {**card.get("trained", {}), "lm": _lm_summary(lm)}}
    write_editor(
        target,
        {
            **_editor_networks(source, preset),
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
                "prediction_type": preset.prediction,
            }
        ),
        dtype=dtype,
        card=card,
        shard=15_000_000,
        files=kept,
    )


def _clip_tokenizer(folder: Path) -> list[Path]:
    """The files of CLIP's own tokenizer. Without any, it has the text encoder's (`models.clip.Clip.load`)."""
    return sorted((folder / "clip").glob("tokenizer*.json"))


def _editor_networks(source: Path, preset: Preset) -> dict[str, Any]:
    """The finished UNet and text encoder, or else the EMA of the newest `unet` or `perception` state.

    Without a state, they are those of the model that the build started from.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    def read(unet: str, text_encoder: str) -> dict[str, Any] | None:
        if not ((source / unet).exists() and (source / text_encoder).exists()):
            return None
        return {
            "unet": UNet2DConditionModel.from_pretrained(source / unet),
            "text_encoder": CLIPTextModel.from_pretrained(source / text_encoder),
        }

    if written := read("unet", "text_encoder"):  # by `decay`
        return written
    states = (Checkpoints(source / "state" / stage).load() for stage in ("unet", "perception"))
    state = next((found for found in states if found is not None), None)
    if state is None:
        if started := read("start/unet", "text_tower"):
            return started
        raise InputError(f"{source} has no trained UNet yet; run: ip2p storybook build --out {source}")
    shape = {key: _hashable(state["fingerprint"][key]) for key in SHAPE}
    networks = {
        "unet": new_unet(replace(preset, **shape)),
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
    """The content of the model's `ip2p.json`.

    An unfinished UNet counts with its progress; one that started from a trained model adds to its numbers.
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
        **run.summary("start").get("recommended", {}),
    }
