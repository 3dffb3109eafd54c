"""Stages `encoder` and `decoder`: a KL autoencoder with 8 x 8 pixels per latent cell and white latents.

1. The encoder is set to the linear projection of each patch on its principal components, scaled to unit
   variance. It is not trained, so the latents do not depend on the decoder, and the editor can be trained
   independently of it.
2. The decoder is trained on crops, most of them of a thing, with a constant learning rate.
3. It is trained on whole pages with a decreasing learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ip2p.pictures.images import signed_psnr
from ip2p.training.objective import place_seed
from ip2p.training.storybook.data import Crops, Pages, draw_planes, read_ahead, to_signed, training_scene
from ip2p.training.storybook.presets import Preset
from ip2p.training.storybook.stage import SUMMARY, Run, train_stage


def new_autoencoder(preset: Preset) -> Any:
    """The untrained autoencoder, a diffusers AutoencoderKL."""
    from diffusers import AutoencoderKL

    levels = len(preset.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=preset.vae_channels,
        layers_per_block=preset.vae_layers,
        latent_channels=preset.latent_channels,
        # A single group: several groups would remove the level of each group.
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=preset.size,
    )
    for name, parameter in vae.named_parameters():
        if "resnets" in name and ".conv2." in name:
            nn.init.zeros_(parameter)  # a residual block starts as the identity
    return vae


# --- initialization: principal components of patches -----------------------------------------


@torch.no_grad()
def start_from_components(vae: Any, pages: Float[Tensor, "batch 3 height width"]) -> None:
    """Set the encoder to the projection of each 8 x 8 patch on its principal components, of unit variance.

    pages: pictures in [-1, 1]. The strided convolution of each level computes the principal components of
    2 x 2 neighbors, one per channel. The last normalization and SiLU do not change values, because constant
    channels fix the scale, and because SiLU(x) - SiLU(-x) = x.
    """
    encoder = vae.encoder
    mean = pages.mean(dim=(0, 2, 3))
    x, unit = pages - mean[:, None, None], torch.ones(3)  # channels hold `x / unit`
    _set_conv(encoder.conv_in, torch.eye(3))
    encoder.conv_in.bias[:3] = -mean
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _set_conv(resnet.conv_shortcut, torch.eye(x.shape[1]))
        if block.downsamplers is not None:
            conv = block.downsamplers[0].conv
            patches = F.pixel_unshuffle(x, 2)  # channel c of neighbor (a, b) becomes 4c + 2a + b
            axes, x, new_unit = components(patches, conv.out_channels)
            axes = axes * unit.repeat_interleave(4) / new_unit[:, None]
            _set_conv(conv, axes.view(len(axes), -1, 2, 2))
            unit = new_unit
    # The last level has the components, then the first of them with the opposite sign.
    known, latents = x.shape[1], vae.config.latent_channels
    axes, x, new_unit = components(x, known)
    axes, x = axes * unit / new_unit[:, None], x / new_unit[:, None, None]
    last = encoder.down_blocks[-1].resnets[0].conv_shortcut
    width = last.out_channels
    _set_conv(last, torch.cat([axes, -axes[:latents]])[: width - CONSTANTS])
    power = float(x.square().mean(dim=(0, 2, 3)).sum() + x[:, :latents].square().mean(dim=(0, 2, 3)).sum())
    level = math.sqrt(8 * power / CONSTANTS)
    last.bias[width - CONSTANTS :] = level * torch.tensor([1.0, -1.0]).repeat(CONSTANTS // 2)
    scale = math.sqrt((CONSTANTS * level**2 + power) / width)
    encoder.conv_norm_out.weight.fill_(1.0)
    encoder.conv_norm_out.bias.zero_()
    out = encoder.conv_out
    out.weight.zero_()
    out.bias.zero_()
    for k in range(latents):
        to_unit = scale / float(x[:, k].std())
        out.weight[k, k, 1, 1], out.weight[k, known + k, 1, 1] = to_unit, -to_unit
    out.bias[latents:] = START_LOGVAR
    for conv, size in ((vae.quant_conv, 2 * latents), (vae.post_quant_conv, latents)):
        _set_conv(conv, torch.eye(size))


CONSTANTS = 8  # constant channels of the encoder's last level
START_LOGVAR = -6.0


def components(
    x: Float[Tensor, "batch channels h w"], count: int
) -> tuple[Float[Tensor, "count channels"], Float[Tensor, "batch count h w"], Float[Tensor, " count"]]:
    """The principal axes of the channels by decreasing variance, the components, and their units.

    A unit is the standard deviation, with a lower limit for components with almost no variance.
    """
    rows = x.transpose(0, 1).reshape(x.shape[1], -1).double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    variances, axes = torch.linalg.eigh(rows @ rows.T / rows.shape[1])
    axes, spread = axes.flip(1).T[:count].float(), variances.flip(0)[:count].clamp(min=0).sqrt().float()
    return axes, torch.einsum("kc,bchw->bkhw", axes, x), spread.clamp(min=0.02 * float(spread[0]))


def _set_conv(conv: nn.Conv2d, weight: Tensor) -> None:
    """Set the kernel's center or upper left to `weight`, [out, in] or [out, in, 2, 2], and the rest to 0."""
    conv.weight.zero_()
    if conv.bias is not None:
        conv.bias.zero_()
    rows, columns = weight.shape[:2]
    if weight.ndim == 4:
        conv.weight[:rows, :columns, :2, :2] = weight
    else:
        middle = conv.kernel_size[0] // 2
        conv.weight[:rows, :columns, middle, middle] = weight


def skip_identities(encoder: nn.Module) -> None:
    """Skip residual branches whose output is exactly zero, in place; the encoder's output does not change.

    In an encoder of `start_from_components`, these are all of them, and most of the computing time.
    """
    from diffusers.models.resnet import ResnetBlock2D

    def shortcut(block: Any) -> Callable[..., Tensor]:
        return lambda x, temb=None: x if block.conv_shortcut is None else block.conv_shortcut(x)

    for block in encoder.modules():
        if isinstance(block, ResnetBlock2D) and not any(p.any() for p in block.conv2.parameters()):
            block.forward = shortcut(block)  # type: ignore[method-assign]


# --- the loss ---------------------------------------------------------------------------------


class DecoderTask(nn.Module):
    """The decoder's loss for pictures in [-1, 1], [batch, 3, h, w], and the noise to add to their latents.

    The noise is scaled by the standard deviation of the encoder's posterior, so that the decoder tolerates
    small errors in an editor's latents.
    """

    def __init__(self, vae: Any, preset: Preset) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.preset = preset
        self._vae = [vae]  # in a list, so that the encoder is not a submodule and is not trained or saved

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        vae = self._vae[0]
        x, noise = (part.to(vae.device) for part in batch)
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean.float() + posterior.std.float() * noise
        error = vae.decode(z).sample.float() - x
        loss = picture_loss(error, self.preset.hue_weight, self.preset.gradient_weight)
        return loss, {"psnr": float(signed_psnr(error.detach().square().mean()))}


def picture_loss(error: Float[Tensor, "batch 3 h w"], hue: float, gradient: float) -> Float[Tensor, ""]:
    """|e| + 2 e^2, plus the absolute errors of hue (R-G, G-B) and of the differences of neighboring pixels.

    Absolute errors preserve edges, and squared errors determine PSNR. The hue of a small thing is a small
    part of either and would be learned last.
    """
    loss = error.abs().mean() + 2 * error.square().mean()
    loss = loss + hue * (error[:, :2] - error[:, 1:]).abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return loss + gradient * (across + down) / 2


# --- the stages -------------------------------------------------------------------------------


@torch.no_grad()
def measure_autoencoder(vae: Any, run: Run) -> dict[str, float]:
    """The mean PSNR in dB on 256 new pages, and its 2% quantile (`known_psnr`).

    A picture below `known_psnr` differs from the pages that the autoencoder was trained on.
    """
    values = []
    for x in _pages(run, 256, seed=run.preset.seed + 1):
        rebuilt = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(signed_psnr((rebuilt - x).square().mean(dim=(1, 2, 3))))
    psnr = torch.cat(values)
    return {"psnr": round(float(psnr.mean()), 2), "known_psnr": round(float(psnr.quantile(0.02)), 1)}


def _pages(run: Run, count: int, *, seed: int, batch: int = 16) -> Iterator[Tensor]:
    pages = Pages(batch, run.preset.size, seed)
    return (to_signed(pages.make(index), run.device) for index in range(max(1, count // batch)))


def write_encoder(run: Run) -> None:
    """Write `vae` with the final encoder and an untrained decoder."""
    preset = run.preset
    torch.manual_seed(preset.seed)
    vae = new_autoencoder(preset)
    start_from_components(vae, torch.cat(list(_pages(run, preset.pca_pages, seed=preset.seed + 2))).cpu())
    vae.save_pretrained(run.output / "vae")
    run.finish("encoder", {})


def train_decoder(run: Run) -> None:
    """Train the decoder of `vae` further, first on crops, and write it. Raises OutOfTime."""
    from diffusers import AutoencoderKL

    preset = run.preset
    vae = AutoencoderKL.from_pretrained(run.output / "vae")
    skip_identities(vae.encoder)
    vae = vae.to(run.device, memory_format=run.numerics.memory_format)
    task = DecoderTask(vae, preset)
    keys = ("size", "vae_channels", "vae_layers", "latent_channels", "hue_weight", "gradient_weight")
    fingerprint = {key: getattr(preset, key) for key in keys}
    seed = preset.seed + run.seed_shift

    def crops(first: int) -> Iterator[list[Any]]:
        return _with_noise(run, Crops(preset.decoder.batch, preset.size, seed, first, crop=preset.crop))

    def pages(first: int) -> Iterator[list[Any]]:
        return _with_noise(run, Pages(preset.decoder_pages.batch, preset.size, seed + 3, first))

    first = train_stage(
        run, "decoder_crops", task, preset.decoder, crops, fingerprint=fingerprint, optimizer="muon"
    )
    summary = train_stage(
        run,
        run.restart_after("decoder", first["steps"]),
        task,
        preset.decoder_pages,
        pages,
        fingerprint=fingerprint,
        after="decoder_crops",
        optimizer="muon",
    )
    vae.eval()
    measured = measure_autoencoder(vae, run)
    run.log(f"decoder: {measured['psnr']:.2f} dB on new pages")
    vae.to(memory_format=torch.contiguous_format).save_pretrained(run.output / "vae")
    before = (run.summary("start").get("decoder") or {}).get
    summary.update({key: round(before(key, 0) + first[key] + summary[key], 1) for key in SUMMARY})
    run.finish("decoder", {**summary, **measured})


def _with_noise(run: Run, pictures: Crops | Pages) -> Iterator[list[Any]]:
    """Batches of pictures, and of noise for their latents."""
    channels, factor = run.preset.latent_channels, 2 ** (len(run.preset.vae_channels) - 1)
    kind = type(pictures).__name__
    for step, pixels in enumerate(read_ahead(pictures, run.preset.workers), pictures.start):
        generator = torch.Generator().manual_seed(place_seed("decoder", kind, run.preset.seed, step))
        side = pixels.shape[-1] // factor
        noise = torch.randn((len(pixels), channels, side, side), generator=generator)
        yield [(to_signed(pixels, run.device), noise)]


@torch.no_grad()
def channel_weights(vae: Any, preset: Preset, pages: int = 64) -> Float[Tensor, " channels"]:
    """Weights of the latent channels in the editor's loss, [channels], with mean 1.

    Latent channels have unit variance, so the plain loss would count the brightness of a patch, which is
    three quarters of the pixels' variance, as much as its finest texture. A channel's weight is proportional
    to the standard deviation of the part of the pixels that it explains.
    """
    scenes = [training_scene("channel weights", number) for number in range(pages)]
    drawn = torch.from_numpy(np.stack([draw_planes(scene, preset.size) for scene in scenes]))
    pixels = to_signed(drawn, vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(16)])
    side = pixels.shape[-1] // latents.shape[-1]
    patches = F.pixel_unshuffle(pixels, side)
    z, p = (x.movedim(1, -1).flatten(0, 2) for x in (latents, patches))
    covariance = (z - z.mean(0)).T @ (p - p.mean(0)) / len(z)
    power = covariance.square().sum(dim=1) / z.var(dim=0)
    weights: Tensor = power.sqrt() / power.sqrt().mean()
    return weights
