"""Shared fixtures, and the import hook that checks every shape annotation while tests run."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

# This must come before any import of these modules, so the fixtures below import the package late.
install_import_hook(["ip2p.diffusion", "ip2p.models.clip"], "beartype.beartype")

SIZE = 64


def make_tokenizer(folder: Path):
    """A CLIPTokenizer with single-byte tokens and a few merges, so it can encode any text."""
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


def make_model(
    folder: Path, *, latent_channels: int = 4, in_channels: int | None = None, seed: int = 0
) -> Path:
    """Write a random-weight editor in the layout of diffusers' edit pipeline: 64², 16x16 latents.

    in_channels: UNet input channels; None means twice latent_channels, as in an editor.
    """
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
        in_channels=in_channels or 2 * latent_channels,
        out_channels=latent_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    # Untrained, it never pulls x towards the data, so rounding errors of the first steps (sigma · scale)
    # persist to the end. A smaller output keeps them well under the parity tests' tolerance of 1e-4.
    unet.conv_out.weight.data *= 0.25
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
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
    from ip2p.editing.editor import Editor

    return Editor.load(tiny_model_dir, device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def page() -> Image.Image:
    """A smooth 64x64 picture."""
    ramp = torch.linspace(0, 255, SIZE)
    red, green = ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE)
    values = torch.stack([red, green, 255 - red], dim=-1)
    return Image.fromarray(values.byte().numpy())


def make_clip(folder: Path) -> Path:
    """Write a random CLIPModel with its tokenizer: 32x32 pictures, 16-dimensional embeddings."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight CLIP. Do not write into it."""
    return make_clip(tmp_path_factory.mktemp("clips") / "clip")


def make_controlnet(*, cross_attention_dim: int = 32, seed: int = 1, **more):
    """A random ControlNet for the model of `make_model`. Its zero-initialized layers get random weights."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    shape = {
        "in_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16, 16),
    }
    network = ControlNetModel(**(shape | more)).eval().requires_grad_(False)
    lasts = [*network.controlnet_down_blocks, network.controlnet_mid_block]
    for last in [*lasts, network.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(last.weight, std=0.05)
    return network


def make_text_encoder(tokenizer, *, layers: int = 2, openclip: bool = False, projected: bool = False):
    """A random text encoder with 64-wide heads, like every published one: OpenAI's CLIP or OpenCLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="gelu" if openclip else "quick_gelu",
        projection_dim=32 if projected else 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def make_vae(scaling_factor: float, sample_size: int, latent_channels: int = 4):
    """A random autoencoder. Its config, like those of the models below, follows from its tensor shapes."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def make_scheduler(prediction: str = "epsilon"):
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        prediction_type=prediction,
    )


def make_sd_model(
    folder: Path,
    *,
    version: int = 1,
    latent_channels: int = 4,
    in_channels: int | None = None,
    prediction: str = "epsilon",
) -> Path:
    """Write a small random model with the structure of SD 1.x or 2.x: the same blocks, heads and groups.

    in_channels: UNet input channels; None means twice latent_channels, as in an editor.
    """
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(version)
    tokenizer = make_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=in_channels or 2 * latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8 if version == 1 else (1, 2),
        use_linear_projection=version == 2,
    )
    unet.conv_out.weight.data *= 0.25  # as in `make_model`
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=make_vae(0.18215, 512, latent_channels),
        text_encoder=make_text_encoder(tokenizer, openclip=version == 2),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_xl_model(folder: Path) -> Path:
    """Write a small random SDXL editor in the layout of StableDiffusionXLInstructPix2PixPipeline."""
    from diffusers import StableDiffusionXLInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(3)
    first, second = make_tokenizer(folder / "tokenizer"), make_tokenizer(folder / "tokenizer_2")
    unet = UNet2DConditionModel(
        sample_size=128,
        in_channels=8,
        block_out_channels=(64, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 32,
    )
    unet.conv_out.weight.data *= 0.25  # as in `make_model`
    pipeline = StableDiffusionXLInstructPix2PixPipeline(
        vae=make_vae(0.13025, 1024),
        text_encoder=make_text_encoder(first, layers=3),
        text_encoder_2=make_text_encoder(second, layers=3, openclip=True, projected=True),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd1_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SD 1.x editor. Do not write into it or the next two."""
    return make_sd_model(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="session")
def sd2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SD 2.x editor: linear projections, OpenCLIP, v-prediction."""
    return make_sd_model(tmp_path_factory.mktemp("models") / "sd2", version=2, prediction="v_prediction")


@pytest.fixture(scope="session")
def xl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SDXL editor."""
    return make_xl_model(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no IP2P_ variables in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IP2P_")]:
        monkeypatch.delenv(name)
    return tmp_path
