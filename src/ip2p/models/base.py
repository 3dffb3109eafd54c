"""Models that training starts from: Stable Diffusion, an editor, or a randomly initialized UNet."""

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
    """Load an editor (as `bundle.load_bundle` does) or Stable Diffusion for training, in fp32.

    The UNet of Stable Diffusion is widened to take a picture (`Bundle.widened`). The UNet requires gradients
    and owns its weights, so no change reaches a file; the other networks are frozen. Raises ModelError, also
    for a model that cannot be trained: another number of input channels, or CosXL.
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
        # The weights may be mapped pages of the file.
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
    """A UNet initialized randomly with `seed`; all other parts are those of the model `parts`.

    unet_config: a config of diffusers' UNet2DConditionModel, its JSON file, or a folder with `config.json`.
    The rest is as in `load_base`. Raises ModelError for a config that does not fit the other parts.
    """
    source = "the UNet's config" if isinstance(unet_config, Mapping) else str(unet_config)
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
    # The card describes the old UNet, except for the value that belongs to the autoencoder.
    card = {key: value for key, value in stored.card.items() if key == "known_psnr"}
    unet = _drawn(config, seed, source).to(device).eval().requires_grad_(True)
    fresh = replace(stored, configs=stored.configs | {"unet": config}, card=card)
    return make_bundle(fresh, "new", device=device, dtype=torch.float32, vae=vae, unet=unet)


def prediction_of(bundle: Bundle) -> Prediction:
    """What the base's UNet predicts, by its scheduler's config. Raises ModelError for any other type."""
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
    expected = {
        "in_channels": needed,
        "out_channels": latent,
        "cross_attention_dim": features,
        "addition_embed_type": "text_time" if xl else None,
    }
    for field, value in expected.items():
        found = config.get(field)
        if found != value and not (isinstance(found, list) and set(found) == {value}):
            raise ModelError(
                f"{source} has {field} {found}; an editor with the parts of {stored.path} needs {value}."
            )


def _drawn(config: Mapping[str, Any], seed: int, source: str) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    empty_network("unet", config)  # checks the config without using memory
    # On the CPU, so that a seed gives the same weights on every machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return UNet2DConditionModel.from_config(dict(config))
        except Exception as error:
            raise ModelError(unreadable(Path(source), error)) from None
