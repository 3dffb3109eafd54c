"""Infers the configs of an LDM file from the shapes of its weights: SD 1.x, SD 2.x, SDXL and CosXL.

Values that shapes do not determine are those that all published models of an architecture share: heads of
64 (SD 1.x: 8 heads), groups of 32, the noise schedule, the scale of the latents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ip2p.base.errors import ModelError
from ip2p.models.keys import CLIP, CLIP_XL, OPENCLIP, OPENCLIP_XL, UNET, VAE, Shape

INPUT = UNET + "input_blocks.0.0.weight"
HEAD = 64
LATENT_SCALES = {"SD 1.x": 0.18215, "SD 2.x": 0.18215, "SDXL": 0.13025}
# CosXL stores the ends of its noise levels as weights; the values are those of the published file.
COSXL_MAX, COSXL_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
COSXL_SIGMAS = {"sigma_max": 120.0, "sigma_min": 0.002}
# Empty marker weights of other tools: the model predicts velocity; it has zero terminal SNR.
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"
SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "linspace",
}
Config = dict[str, Any]


def architecture(shapes: Mapping[str, Shape]) -> str:
    """SD 1.x, SD 2.x or SDXL, by the text encoders in the file. Raises ModelError for none."""
    if f"{OPENCLIP_XL}token_embedding.weight" in shapes and any(key.startswith(CLIP_XL) for key in shapes):
        return "SDXL"
    if OPENCLIP + "token_embedding.weight" in shapes:
        return "SD 2.x"
    if any(key.startswith(CLIP) for key in shapes):
        return "SD 1.x"
    if OPENCLIP_XL.replace("1", "0") + "token_embedding.weight" in shapes:
        raise ModelError("This is an SDXL refiner, with one text encoder; it is no editor. Use the base's.")
    raise ModelError("It holds no text encoder of SD 1.x, SD 2.x or SDXL. Use the whole model's file.")


def has_text_encoder(shapes: Mapping[str, Shape]) -> bool:
    """Whether a file contains any text encoder, known or not."""
    return any(key.startswith(("cond_stage_model.", "conditioner.")) for key in shapes)


def ldm_configs(
    shapes: Mapping[str, Shape], *, sigmas: Mapping[str, float], velocity: bool
) -> dict[str, Config]:
    """The configs of every part, by its name in a diffusers folder.

    sigmas: those of a CosXL file, else {}. velocity: whether the UNet predicts velocity. Raises ModelError
    for an unknown architecture.
    """
    if INPUT not in shapes:
        raise ModelError(
            f"It has no {INPUT}, which every Stable Diffusion model in the LDM layout has. "
            "Use a whole model's .safetensors or .ckpt, or a diffusers folder."
        )
    kind = architecture(shapes)
    xl = kind == "SDXL"
    side = 1024 if xl else 768 if kind == "SD 2.x" and velocity else 512
    if any(key.startswith(VAE) for key in shapes):
        vae = vae_config(shapes, scale=LATENT_SCALES[kind], side=side)
    else:
        vae = _usual_vae(scale=LATENT_SCALES[kind], side=side, latent=int(shapes[f"{UNET}out.2.weight"][0]))
    configs = {
        "unet": unet_config(shapes, sample_size=side // 2 ** (len(vae["block_out_channels"]) - 1)),
        "vae": vae,
        "text_encoder": _openclip_config(shapes, OPENCLIP)
        if kind == "SD 2.x"
        else _clip_config(shapes, CLIP_XL if xl else CLIP),
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction" if velocity else "epsilon"},
    }
    if ZERO_SNR in shapes:
        configs["scheduler"]["rescale_betas_zero_snr"] = True
    if xl:
        configs["text_encoder_2"] = _openclip_config(shapes, OPENCLIP_XL)
        projected = configs["text_encoder_2"]["projection_dim"]
        # Six numbers: the sizes before and after cropping, and the crop.
        each, rest = divmod(configs["unet"]["projection_class_embeddings_input_dim"] - projected, 6)
        configs["unet"]["addition_time_embed_dim"] = each if not rest else 256
    if sigmas:
        configs["scheduler"] = {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
            **COSXL_SIGMAS,
            **sigmas,
        }
    return configs


def unet_config(shapes: Mapping[str, Shape], sample_size: int) -> Config:
    """UNet2DConditionModel's config from the shapes under `model.diffusion_model.`."""
    levels: list[list[tuple[int, int]]] = [[]]  # for each level its layers: channels, transformer depth
    row = 1
    while True:
        block = f"{UNET}input_blocks.{row}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        elif f"{block}0.in_layers.2.weight" in shapes:
            levels[-1].append((shapes[f"{block}0.in_layers.2.weight"][0], _depth(shapes, f"{block}1.")))
        else:
            break
        row += 1
    layers = {len(level) for level in levels}
    if len(layers) != 1 or 0 in layers:
        raise ModelError("Its UNet's levels are not of one number of layers. Use a diffusers folder of it.")
    channels = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    middle = _depth(shapes, f"{UNET}middle_block.1.")
    proj_in = shapes.get(f"{UNET}middle_block.1.proj_in.weight")
    text = shapes.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if not middle or proj_in is None or text is None:
        raise ModelError(
            "Its UNet's middle has no attention, as SD and SDXL have. Use a diffusers folder of it."
        )
    linear = len(proj_in) == 2
    # A level without attention takes no depth; the last one's is also the middle's.
    transformers = [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle]
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": shapes[INPUT][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": transformers if set(transformers) != {1} else 1,
        "cross_attention_dim": text[1],
        # diffusers' name says dimension and means the number of heads.
        "attention_head_dim": [max(1, count // HEAD) for count in channels] if linear else 8,
        "use_linear_projection": linear,
    }
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    if label is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": label[1],
        }
    return config


def vae_config(shapes: Mapping[str, Shape], *, scale: float, side: int, prefix: str = VAE) -> Config:
    """AutoencoderKL's config from the shapes under `first_stage_model.`."""
    first = f"{prefix}encoder.down.%d.block.%d.conv1.weight"
    levels = _count(shapes, rf"{re.escape(prefix)}encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    layers = _count(shapes, rf"{re.escape(prefix)}encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    if not levels or f"{prefix}decoder.conv_in.weight" not in shapes:
        raise ModelError("It holds no autoencoder in the LDM layout. Use a whole model's file.")
    return _usual_vae(scale=scale, side=side, latent=shapes[f"{prefix}decoder.conv_in.weight"][1]) | {
        "in_channels": shapes[f"{prefix}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{prefix}decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[first % (level, 0)][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "mid_block_add_attention": f"{prefix}encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": f"{prefix}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in shapes,
    }


def _usual_vae(*, scale: float, side: int, latent: int) -> Config:
    """The config of the autoencoder that the published models share."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": side,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "scaling_factor": scale,
    }


def clip_inner(shapes: Mapping[str, Shape], prefix: str) -> str:
    """`text_model.`, or "" for older files, which omit it."""
    return "text_model." if any(key.startswith(prefix + "text_model.") for key in shapes) else ""


def _clip_config(shapes: Mapping[str, Shape], prefix: str) -> Config:
    prefix += clip_inner(shapes, prefix)
    layer = "encoder.layers.{}.mlp.fc1.weight"
    names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", layer)
    return _encoder_config(shapes, prefix, *names, activation="quick_gelu")


def _openclip_config(shapes: Mapping[str, Shape], prefix: str) -> Config:
    layer = "transformer.resblocks.{}.mlp.c_fc.weight"
    names = ("token_embedding.weight", "positional_embedding", layer)
    config = _encoder_config(shapes, prefix, *names, activation="gelu")
    projection = shapes.get(prefix + "text_projection")
    if projection is not None:
        config["projection_dim"] = projection[1]
        # SD 2.x reads the penultimate layer, with the last norm. A file that has the last layer too also has
        # its projection, which only that layer feeds; diffusers' folders omit both.
        config["num_hidden_layers"] -= prefix == OPENCLIP
    return config


def _encoder_config(
    shapes: Mapping[str, Shape], prefix: str, words: str, positions: str, layer: str, *, activation: str
) -> Config:
    """A text encoder's config. layer: the first MLP weight, with {} for the number of the layer."""
    try:
        vocabulary, width = shapes[prefix + words]
        return _text_config(
            vocabulary=vocabulary,
            width=width,
            tokens=shapes[prefix + positions][0],
            inner=shapes[prefix + layer.format(0)][0],
            layers=_count(shapes, re.escape(prefix + layer).replace(r"\{\}", r"(\d+)")),
            activation=activation,
            projection=width,
        )
    except KeyError as error:
        raise ModelError(f"Its text encoder lacks {error.args[0]}. Fetch it again.") from None


def _text_config(
    *, vocabulary: int, width: int, tokens: int, inner: int, layers: int, activation: str, projection: int
) -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": tokens,
        "hidden_act": activation,
        "projection_dim": projection,
        # CLIP's vocabulary ends with the tokens of start and end.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _depth(shapes: Mapping[str, Shape], block: str) -> int:
    return _count(shapes, rf"{re.escape(block)}transformer_blocks\.(\d+)\.attn2\.to_k\.weight")


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return len({m[1] for m in map(re.compile(pattern).fullmatch, shapes) if m})
