"""Shared fixtures, and the import hook that checks every shape annotation while tests run."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

# Before anything imports these modules; the fixtures below import the package late for that reason.
install_import_hook(["ip2p.diffusion", "ip2p.clip"], "beartype.beartype")

SIZE = 64


def make_tokenizer(folder: Path):
    """A CLIPTokenizer of single bytes and a few merges: it reads any text."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [
        ("i", "t</w>"),
        ("n", "i"),
        ("ni", "g"),
        ("nig", "h"),
        ("nigh", "t</w>"),
        ("m", "a"),
        ("ma", "k"),
        ("mak", "e</w>"),
    ]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, *, in_channels: int = 8, seed: int = 0) -> Path:
    """Write a random editor in the layout of diffusers' edit pipeline: 64², latents of 16x16."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    end = tokenizer.eos_token_id
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    # Untrained, it never pulls x towards data, so that the rounding of its first steps (sigma · scale)
    # stays to the end. A quieter output keeps that well under the 1e-4 of the parity tests.
    unet.conv_out.weight.data *= 0.25
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=0.7,
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight editor, small enough to run in milliseconds. Do not write into it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_editor(tiny_model_dir: Path):
    """The tiny model, loaded in fp32."""
    from ip2p.editor import Editor

    return Editor.load(tiny_model_dir, device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def page() -> Image.Image:
    """A smooth picture of 64x64."""
    ramp = torch.linspace(0, 255, SIZE)
    red, green = ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE)
    values = torch.stack([red, green, 255 - red], dim=-1)
    return Image.fromarray(values.byte().numpy())
