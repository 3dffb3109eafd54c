"""ControlNet for an editor: a second picture (edges, a pose, depth) that controls the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ip2p.base.errors import ModelError
from ip2p.models.bundle import from_hub
from ip2p.models.load import SINGLE_FILES, load_part, read_json
from ip2p.pictures.images import resized, to_tensor

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from ip2p.models.bundle import Bundle

HUB_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
EXAMPLE = "lllyasviel/control_v11p_sd15_canny"
# Config fields in which a ControlNet must equal the UNet, so that its residuals have the same shapes.
SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block")


@dataclass(frozen=True)
class Control:
    """A ControlNet with its picture [1 or batch, 3, H, W] in [0, 1]; a call returns the residuals."""

    network: ControlNetModel
    picture: Tensor
    scale: float = 1.0

    def __call__(self, noisy: Tensor, time: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """The UNet's keyword arguments, from noisy latents [batch, channels, h, w], time [batch] and text."""
        picture = self.picture.to(noisy).repeat(len(noisy) // len(self.picture), 1, 1, 1)
        down, middle = self.network(
            noisy,
            time,
            encoder_hidden_states=text["encoder_hidden_states"],
            controlnet_cond=picture,
            conditioning_scale=self.scale,
            added_cond_kwargs=dict(text),
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def control_tensor(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB picture at the working size (width, height): [1, 3, H, W] in [0, 1]."""
    return (to_tensor(resized(picture, size)) + 1) / 2


def find_controlnet(model: str | Path) -> Path:
    """The folder of a ControlNet: local, or from the hub's cache. Raises ModelError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if (
        path.suffix in SINGLE_FILES
        or path.parent.is_dir()
        or name.count("/") != 1
        or name.startswith((".", "~"))
    ):
        state = "is not a folder" if path.exists() else "is not there"
        raise ModelError(
            f"{model} {state}; a ControlNet is a folder in the diffusers format, with config.json, or a hub "
            f"name like {EXAMPLE}."
        )
    return from_hub(name, HUB_FILES, lambda folder: any(folder.glob("*.safetensors")))


def load_controlnet(
    model: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """Load a diffusers ControlNetModel from a folder or a hub name. Raises ModelError."""
    folder = find_controlnet(model)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(f"{model} holds a {kind}, not a ControlNetModel. Use one like {EXAMPLE}.")
    from diffusers import ControlNetModel

    return load_part(ControlNetModel, folder, dtype).to(device)


def check_controlnet(network: ControlNetModel, bundle: Bundle) -> None:
    """Raise ModelError for a ControlNet of another base model than the editor's."""
    ours, theirs = bundle.unet.config, network.config
    for name in SHARED:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if _plain(mine) != _plain(other):
            raise ModelError(
                f"This ControlNet's {name} is {other}, the editor's {mine}: they have other bases. "
                f"For an SD 1.5 editor use one like {EXAMPLE}."
            )
    if theirs.in_channels != ours.out_channels:
        raise ModelError(
            f"This ControlNet takes {theirs.in_channels} channels of noise, not {ours.out_channels}. "
            f"For an SD 1.5 editor use one like {EXAMPLE}."
        )
    shrinks = 2 ** (len(theirs.conditioning_embedding_out_channels) - 1)
    if shrinks != bundle.latent_factor:
        raise ModelError(
            f"This ControlNet shrinks its picture {shrinks} times, the editor's autoencoder "
            f"{bundle.latent_factor}. For an SD 1.5 editor use one like {EXAMPLE}."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
