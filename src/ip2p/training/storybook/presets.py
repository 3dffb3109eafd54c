"""The numbers of the storybook build: one recipe in three sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One run of the training loop. It ends after `steps` steps or `minutes`, whichever comes first.

    `schedule` "constant" can be extended at any time; "cosine" falls from `lr` to a fiftieth of it.
    """

    steps: int = 1_000_000
    minutes: float
    batch: int
    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of the recipe. Lengths are in pixels, samples, or minutes of training time."""

    size: int  # side of a page

    # --- the autoencoder: crops without residual blocks, crops, then whole pages as the rate falls
    vae_linear: StageConfig
    vae: StageConfig
    vae_pages: StageConfig
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_layers: int = 1
    latent_channels: int = 16
    crop: int = 64
    pca_pages: int = 128  # pages whose patches give the encoder's start
    whiten_pages: int = 512
    kl_weight: float = 1e-4
    hue_weight: float = 1.0  # of errors in the differences between color channels
    gradient_weight: float = 1.0  # of errors in the differences between neighboring pixels

    # --- all stages
    precision: Literal["auto", "no", "bf16"] = "auto"  # auto: what is faster on this machine
    ema: float = 0.999
    workers: int = 1
    save_every: float = 120.0  # seconds
    seed: int = 1

    @property
    def cells(self) -> int:
        """Latent cells along a side of a page."""
        return self.size // 2 ** (len(self.vae_channels) - 1)


PRESETS: dict[str, Preset] = {
    # Seconds: shows that the whole path runs. Its pictures are noise.
    "smoke": Preset(
        size=64,
        vae_linear=StageConfig(steps=2, minutes=1, batch=4, lr=1e-3, warmup=2),
        vae=StageConfig(steps=4, minutes=1, batch=4, lr=1e-3, warmup=2),
        vae_pages=StageConfig(steps=2, minutes=1, batch=2, lr=1e-3, warmup=0, schedule="cosine"),
        vae_channels=(8, 16, 16, 48),
        crop=32,
        pca_pages=16,
        whiten_pages=16,
        precision="no",
        workers=0,
    ),
    # Two CPU cores, in pieces of any length.
    "cpu": Preset(
        size=128,
        vae_linear=StageConfig(minutes=12, batch=8, lr=2e-3, warmup=50),
        vae=StageConfig(minutes=40, batch=8, lr=1e-3),
        vae_pages=StageConfig(minutes=8, batch=4, lr=1e-3, warmup=0, schedule="cosine"),
        ema=0.998,
    ),
    "h100": Preset(
        size=256,
        vae_linear=StageConfig(minutes=0.5, batch=64, lr=2e-3, warmup=50),
        vae=StageConfig(minutes=5, batch=64, lr=1e-3),
        vae_pages=StageConfig(minutes=1, batch=16, lr=1e-3, warmup=0, schedule="cosine"),
        vae_channels=(32, 64, 96, 128),
        ema=0.9995,
        workers=15,
        save_every=60.0,
    ),
}
