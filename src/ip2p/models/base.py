"""What training starts from: a Stable Diffusion that becomes an editor, an editor, or a UNet of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ip2p.base.errors import ModelError
from ip2p.models.bundle import Bundle, find_model, make_bundle, open_parts
from ip2p.models.load import Choice, Stored, empty_network, open_model, read_json, unreadable
from ip2p.models.widen import widen_conv_in
from ip2p.settings import Prediction

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def load_base(
    base: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    weights: Choice = "auto",
    vae: str | Path | None = None,
    parts_from: str | Path | None = None,
) -> Bundle:
    """Open what `bundle.load_bundle` opens, and Stable Diffusion itself, to be trained.

    A UNet that takes noise alone is widened to take a picture too (`widened` says so). All is fp32. The UNet
    takes gradients and its weights are copies of its own: no change reaches a file. The other networks are
    frozen. Raises ModelError, also for what cannot be trained: a UNet of other channels, CosXL.
    """
    stored = open_model(find_model(base, revision=revision), weights=weights, parts=open_parts(parts_from))
    _check_noise(stored)
    channels, needed = stored.channels
    if channels not in (needed // 2, needed):
        kind = ", as those for inpainting do" if channels == 2 * (needed // 2) + 1 else ""
        raise ModelError(
            f"{stored.path}: its UNet takes {channels} channels{kind}; training starts from {needed // 2} "
            f"(Stable Diffusion) or {needed} (an editor). Name another --base."
        )
    bundle = make_bundle(stored, str(base), device=device, dtype=torch.float32, vae=vae)
    unet = bundle.unet
    for parameter in unet.parameters():
        # They may be pages of the file.
        parameter.data = parameter.data.clone()
    if channels != needed:
        widen_conv_in(unet, needed)
    unet.requires_grad_(True)
    return replace(bundle, widened=channels != needed)


def new_from_config(
    unet_config: Mapping[str, Any] | str | Path,
    parts: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    vae: str | Path | None = None,
    seed: int = 0,
) -> Bundle:
    """A UNet of noise, drawn with `seed`, with everything else from the model `parts`.

    unet_config: as diffusers' UNet2DConditionModel has it, or a JSON file of it, or a folder with
    `config.json`; its `in_channels`, if it says any, are an editor's. All is as `load_base` has it.
    Raises ModelError for a config that does not fit the other parts.
    """
    given = not isinstance(unet_config, Mapping)
    source = "the UNet's config" if not given else str(unet_config)
    if not isinstance(unet_config, Mapping):
        path = Path(unet_config).expanduser()
        unet_config = read_json(path / "config.json" if path.is_dir() else path)
    stored = open_model(find_model(parts, revision=revision))
    _check_noise(stored)
    latent, needed = stored.channels[1] // 2, stored.channels[1]
    config = {"in_channels": needed, "out_channels": latent} | {
        key: value for key, value in unet_config.items() if not key.startswith("_") or key == "_class_name"
    }
    _check_config(config, stored, source)
    # What the model says of itself is true of its old UNet, except of its autoencoder.
    card = {key: value for key, value in stored.card.items() if key == "known_psnr"}
    unet = _drawn(config, seed, source).to(device).eval().requires_grad_(True)
    fresh = replace(stored, configs=stored.configs | {"unet": config}, card=card)
    return make_bundle(fresh, "new", device=device, dtype=torch.float32, vae=vae, unet=unet)


def prediction_of(bundle: Bundle) -> Prediction:
    """What the base's UNet predicts, by its scheduler's config. Raises ModelError for what is not trained."""
    return _prediction(bundle.scheduler_config, bundle.folder)


def _check_noise(stored: Stored) -> None:
    _prediction(stored.configs["scheduler"], stored.path)
    if stored.cosxl:
        raise ModelError(_COSXL.format(stored.path))


_COSXL = (
    "{} is a CosXL model, whose noise levels (EDM) are not trained here. "
    "Use an SDXL base or editor with the usual scheduler."
)


def _prediction(config: Mapping[str, Any], path: Path) -> Prediction:
    name, prediction = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    if name.startswith("EDM") or "sigma_data" in config:
        raise ModelError(_COSXL.format(path))
    if name.startswith("FlowMatch"):
        raise ModelError(
            f"{path} is a flow model ({name}); editors are trained from ones that predict noise or "
            "velocity. Use an SD 1.x, SD 2.x or SDXL model."
        )
    if prediction in get_args(Prediction):
        return prediction  # type: ignore[no-any-return]
    raise ModelError(
        f"{path}: its scheduler's prediction_type is {prediction!r}; epsilon, v_prediction and sample can be "
        "trained. Use a model of one of these kinds."
    )


def _check_config(config: Mapping[str, Any], stored: Stored, source: str) -> None:
    latent, needed = stored.channels[1] // 2, stored.channels[1]
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ModelError(f"{source} is of a {kind}, not of a UNet2DConditionModel. Name another config.")
    texts = [stored.configs[part] for part in ("text_encoder", "text_encoder_2") if part in stored.configs]
    features = sum(int((text.get("text_config") or text).get("hidden_size", 512)) for text in texts)
    xl = stored.kind == "sdxl"
    wanted = {
        "in_channels": needed,
        "out_channels": latent,
        "cross_attention_dim": features,
        "addition_embed_type": "text_time" if xl else None,
    }
    for field, value in wanted.items():
        said = config.get(field)
        if said != value and not (isinstance(said, list) and set(said) == {value}):
            raise ModelError(
                f"{source} has {field} {said}; an editor with the parts of {stored.path} needs {value}."
            )


def _drawn(config: Mapping[str, Any], seed: int, source: str) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    empty_network("unet", config)  # says what is wrong with a config, and takes no memory
    # On the CPU, so that a seed gives the same weights everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return UNet2DConditionModel.from_config(dict(config))
        except Exception as error:
            raise ModelError(unreadable(Path(source), error)) from None
