"""The presets of the storybook build: one recipe in three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ip2p_storybook.rewording import KIND_WEIGHTS

# Edits that a small network learns last.
HARD_KINDS = ("add", "replace", "two", "move", "put_on", "style", "count")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One run of the training loop. It ends after `steps` steps or `minutes`, whichever comes first.

    The schedule "constant" can be extended at any time; "cosine" decreases from `lr` to 2% of it.
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
class PoolConfig:
    """The shards of edited pages that a block of training uses (`samples.EditorSamples`).

    fresh: new shards per block. pool: all shards of a block. reuse: how often each page is used in total.
    shards: maximum number of shards on disk; later blocks reuse them.
    """

    fresh: int = 4
    pool: int = 12
    reuse: int = 4
    shards: int = 400


def kind_shares(often: Mapping[str, float]) -> dict[str, float]:
    """The relative frequency of each kind of edit, with the factors in `often`."""
    return {kind: weight * often.get(kind, 1.0) for kind, weight in KIND_WEIGHTS.items()}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of the recipe. Lengths are in pixels, samples, or minutes of training time."""

    size: int  # side of a page

    # --- the autoencoder: a fixed encoder; a decoder trained on crops, then on whole pages
    decoder: StageConfig
    decoder_pages: StageConfig
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_layers: int = 1
    latent_channels: int = 16
    crop: int = 64
    pca_pages: int = 512  # pages that determine the encoder
    hue_weight: float = 1.0  # of errors in the differences between color channels
    gradient_weight: float = 1.0  # of errors in the differences between neighboring pixels

    # --- the text encoder and CLIP
    text: StageConfig
    clip: StageConfig
    text_width: int = 192
    text_layers: int = 3
    clip_layers: int = 4
    clip_pixels: int = 64
    clip_patch: int = 8

    # --- the editor's training pages
    groups: int = 64  # base pages per shard
    edits: int = 5  # edited versions of each
    often: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(HARD_KINDS, 1.5))
    pool: PoolConfig = PoolConfig()

    # --- the editor: perception, the edit at a constant learning rate, and its decay
    perception: StageConfig
    unet: StageConfig
    decay: StageConfig
    unet_channels: tuple[int, ...] = (128, 192)
    unet_layers: int | tuple[int, ...] = 1
    unet_groups: int = 8
    fine_attention: bool = False  # whether the last up block has attention
    heads: int | tuple[int, ...] = 4  # of attention, or per level
    # The accuracies at which perception ends (`editor.measure_perception`), and its maximum minutes.
    gates: Mapping[str, float] = field(default_factory=lambda: {"kind": 0.9, "change": 0.7})
    perception_most: float
    # A small network that predicts noise or velocity needs most of its samples to learn to copy the page. One
    # that predicts x0 is initialized to the copy (`editor.start_as_copy`). The paper uses "epsilon".
    prediction: str = "sample"
    snr_clip: tuple[float, float] | None = (1.0, 5.0)
    # t = 1000 u^power: below 1 favors noisy steps, which determine the edit. The paper uses 1.
    timestep_power: float = 0.5
    # Changed cells have a higher weight, at most `change_weight_most`, so that they make up about
    # `change_share` of a sample's loss: a hat is two of 256 cells (`training.loss.change_weights`).
    change_share: float = 0.5
    change_weight_most: float = 24.0
    caption_share: float = 0.12  # samples with a caption and no page
    head_weight: float = 0.25  # initial weight of the perception heads' loss in stage unet
    head_weight_least: float = 0.03
    head_half_life: float = 100_000  # samples

    # --- the language model: 177,000 parameters; its tokens are words and phrases of captions
    lm: StageConfig
    lm_width: int = 64
    lm_layers: int = 4
    lm_heads: int = 4
    lm_inner: int = 96
    lm_texts: int = 20_000  # triples that determine its tokens
    lm_edited: float = 4.0  # weight of an edited caption's tokens

    # --- all stages
    precision: Literal["auto", "no", "bf16"] = "auto"  # auto: the faster one on this machine
    ema: float = 0.999
    workers: int = 1
    save_every: float = 120.0  # seconds
    seed: int = 1

    @property
    def cells(self) -> int:
        """Latent cells along a side of a page."""
        return self.size // 2 ** (len(self.vae_channels) - 1)


PRESETS: dict[str, Preset] = {
    # Takes seconds and tests all stages; its pictures are noise.
    "smoke": Preset(
        size=64,
        decoder=StageConfig(steps=4, minutes=1, batch=4, lr=1e-3, warmup=2),
        decoder_pages=StageConfig(steps=4, minutes=1, batch=2, lr=1e-3, warmup=0, schedule="cosine"),
        vae_channels=(8, 16, 16, 48),
        crop=32,
        pca_pages=16,
        text=StageConfig(steps=4, minutes=1, batch=8, lr=1e-3, warmup=2),
        clip=StageConfig(steps=4, minutes=1, batch=8, lr=1e-3, warmup=2),
        text_width=32,
        text_layers=1,
        clip_layers=1,
        groups=2,
        edits=3,
        pool=PoolConfig(fresh=1, pool=2, reuse=2, shards=4),
        perception=StageConfig(steps=4, minutes=1, batch=4, lr=1e-3, warmup=2),
        unet=StageConfig(steps=6, minutes=1, batch=4, lr=1e-3, warmup=2),
        decay=StageConfig(steps=4, minutes=1, batch=4, lr=1e-3, warmup=0, schedule="cosine"),
        unet_channels=(128, 32),
        heads=2,
        gates={},
        perception_most=1,
        lm=StageConfig(steps=6, minutes=1, batch=4, lr=1e-3, warmup=2, schedule="cosine"),
        lm_width=16,
        lm_layers=1,
        lm_heads=2,
        lm_inner=16,
        lm_texts=50,
        precision="no",
        workers=0,
    ),
    # For two CPU cores, in calls of any length.
    "cpu": Preset(
        size=128,
        decoder=StageConfig(minutes=60, batch=16, lr=2.5e-3),
        decoder_pages=StageConfig(minutes=8, batch=4, lr=2.5e-3, warmup=0, schedule="cosine"),
        text=StageConfig(minutes=12, batch=64, lr=1e-3, schedule="cosine"),
        clip=StageConfig(minutes=8, batch=96, lr=1e-3, schedule="cosine"),
        perception=StageConfig(minutes=12, batch=32, lr=1e-3),
        unet=StageConfig(minutes=240, batch=32, lr=7e-4),
        pool=PoolConfig(fresh=12, pool=24, reuse=2),
        decay=StageConfig(minutes=35, batch=32, lr=7e-4, warmup=0, schedule="cosine"),
        perception_most=18,
        lm=StageConfig(steps=8000, minutes=30, batch=64, lr=4e-3, schedule="cosine"),
        ema=0.995,  # perception is measured with the EMA, which lags by 500 steps at 0.998
    ),
    # For one H100, in calls of some minutes. The encoder and its latents are the same as in `cpu`.
    "h100": Preset(
        size=128,
        decoder=StageConfig(minutes=4, batch=32, lr=1e-3),
        decoder_pages=StageConfig(minutes=0.7, batch=16, lr=1e-3, warmup=0, schedule="cosine"),
        text=StageConfig(minutes=1, batch=512, lr=1e-3, schedule="cosine"),
        clip=StageConfig(minutes=1.5, batch=512, lr=1e-3, schedule="cosine"),
        pool=PoolConfig(fresh=30, pool=90, reuse=4, shards=1500),
        perception=StageConfig(minutes=5, batch=256, lr=1e-3),
        unet=StageConfig(minutes=12, batch=256, lr=7e-4),
        decay=StageConfig(minutes=3, batch=256, lr=7e-4, warmup=0, schedule="cosine"),
        unet_channels=(160, 192),
        unet_layers=(2, 1),
        fine_attention=True,
        perception_most=8,
        lm=StageConfig(steps=20_000, minutes=6, batch=64, lr=4e-3, schedule="cosine"),
        ema=0.9995,
        workers=15,
        save_every=60.0,
    ),
}
