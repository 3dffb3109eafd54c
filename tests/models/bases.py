"""Small random Stable Diffusion base models (not editors yet)."""

import json
import shutil
from pathlib import Path

import torch


def make_base(editor: Path, folder: Path, *, channels: int = 4) -> Path:
    """A copy of a small editor with a random UNet of `channels` input channels."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(editor, folder)
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": channels}
    torch.manual_seed(channels)
    unet = UNet2DConditionModel.from_config(config)
    assert unet.conv_in.bias.abs().min() > 0  # so that tests can see that it is copied
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = index["_class_name"].replace("InstructPix2Pix", "")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def random_latent(channels: int, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, channels, 8, 8), generator=generator)


def run_unet(unet, latent):
    """The UNet's output for two latents at two timesteps, with random text and SDXL's extra inputs."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn((2, 77, unet.config.cross_attention_dim), generator=generator)
    added = None
    if unet.config.addition_embed_type:
        pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn((2, pooled), generator=generator),
            "time_ids": torch.full((2, 6), 64.0),
        }
    with torch.no_grad():
        return unet(latent, torch.tensor([900, 10]), text, added_cond_kwargs=added).sample
