"""Train the storybook models, from nothing: `ip2p storybook build --preset smoke|cpu|h100`.

Three stages, each the next one's ground: a KL autoencoder (`vae`), a CLIP with its tokenizer (`clip`)
and the 8-channel editing UNet (`unet`). A fourth stands by itself: the language model that writes edits of
captions (`lm`). Pages, edits and captions are drawn while training runs, so
there is no data set on disk. Every preset is this one recipe with other numbers; every stage saves its
state, stops itself in time, and goes on from where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import write_text
from ip2p.base.ledger import lock_folder
from ip2p.models.clip import MEAN, STD
from ip2p.models.save import edit_scheduler, write_editor
from ip2p.pictures.images import signed_psnr
from ip2p.synth.instruct import MIDDLE, PACKAGED_LM, load_lm, reject
from ip2p.synth.records import Triple
from ip2p.synth.tune import CARD as LM_CARD
from ip2p.synth.tune import IGNORED, batch_of, new_lm, row_of, save_lm
from ip2p.training.cache import encode_pictures
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loop import LoopConfig, fit, new_accelerator
from ip2p.training.loss import BETA_END, BETA_START, TIMESTEPS, scaled_linear_alpha_bar
from ip2p.training.objective import EditTask, Objective, place_seed
from ip2p.training.recognition import Recognition
from ip2p.training.samples import PooledSamples, Share, Words, read_tokens
from ip2p.training.storybook.source import StorybookSource
from ip2p.training.transform import Transform
from ip2p.training.workers import start_worker
from ip2p_storybook.captions import phrases
from ip2p_storybook.labels import EDIT_SIZES, PAGE_SIZES, THING_SIZES
from ip2p_storybook.language import OTHER_NOUNS, plural, words_of
from ip2p_storybook.scene import KINDS, rng_for
from ip2p_storybook.triples import ExactTriple, exact_triples

STAGES = ("vae", "clip", "unet", "lm")
TOLD = ("steps", "samples", "minutes")  # of each stage, on the model's card


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage ends after `steps` steps or `minutes` of its own training time, whichever comes first."""

    steps: int
    minutes: float
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Preset:
    size: int  # picture side in pixels
    vae: StageConfig
    clip: StageConfig
    unet: StageConfig
    lm: StageConfig
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_layers: int = 1
    kl_weight: float = 3e-4
    hue_weight: float = 2.0  # of the autoencoder's errors in the differences between colour channels
    clip_width: int = 192
    clip_layers: tuple[int, int] = (3, 4)  # text tower, image tower
    clip_pixels: int = 64
    clip_patch: int = 8
    unet_channels: tuple[int, ...] = (96, 160, 192)
    unet_layers: int = 1
    heads: int = 4  # of every level's attention but the finest's, which has half as many
    pool: int = 4096  # pairs drawn and encoded at once
    reuse: int = 4  # times each drawn pair is seen, with other noise and dropout
    caption_share: float = 0.08  # samples with a caption and no image
    # Latent cells that the edit changes weigh more, up to `change_weight_most`, so that they make up
    # about `change_share` of a sample's loss: a hat is two cells of 256 (`train.loss.change_weights`).
    change_share: float = 0.5
    change_weight_most: float = 24.0
    # t = 1000 u^power: below 1 favours the noisy steps, where an edit is decided. 1 is the paper's.
    timestep_power: float = 0.5
    # Weight of the losses that teach the network to see and to read (`train.recognition`); 0 is the paper's.
    recognition: float = 0.4
    # The text tower of a CLIP trained for minutes is not Stable Diffusion's: it learns on with the UNet.
    train_text: bool = True
    # A small network that predicts noise needs long to learn even to copy the page at high noise levels,
    # where the clean picture is its input less a large multiple of its output; velocity asks for the
    # picture itself there (recipes/LOG.md has both curves). "epsilon" is the paper's.
    prediction: str = "v_prediction"
    snr_clip: tuple[float, float] | None = (1.0, 5.0)
    # The language model: 177,000 parameters. Its tokens are words and the captions' phrases.
    lm_width: int = 64
    lm_layers: int = 4
    lm_heads: int = 4
    lm_inner: int = 96
    lm_texts: int = 20_000  # triples whose words are its tokens
    lm_edited: float = 4.0  # weight of an edited caption's tokens
    ema: float = 0.999
    workers: int = 1
    save_every: float = 120.0  # seconds
    seed: int = 1


PRESETS: dict[str, Preset] = {
    # Seconds: shows that the whole path runs. Its pictures are noise.
    "smoke": Preset(
        size=64,
        vae=StageConfig(steps=6, minutes=1, batch=4, lr=1e-3, warmup=2),
        clip=StageConfig(steps=4, minutes=1, batch=8, lr=1e-3, warmup=2),
        unet=StageConfig(steps=6, minutes=1, batch=4, lr=1e-3, warmup=2),
        lm=StageConfig(steps=6, minutes=1, batch=4, lr=1e-3, warmup=2),
        vae_channels=(16, 16, 16, 16),
        clip_width=32,
        clip_layers=(1, 1),
        unet_channels=(16, 32, 32),
        heads=2,
        lm_width=16,
        lm_layers=1,
        lm_heads=2,
        lm_inner=16,
        lm_texts=50,
        pool=8,
        reuse=2,
        workers=0,
    ),
    "cpu": Preset(
        size=64,
        vae=StageConfig(steps=1_000_000, minutes=15, batch=4, lr=1.5e-3),
        clip=StageConfig(steps=1_000_000, minutes=6, batch=96, lr=1e-3),
        unet=StageConfig(steps=1_000_000, minutes=112, batch=32, lr=1e-3),
        lm=StageConfig(steps=8000, minutes=30, batch=64, lr=4e-3),
        # Three levels: a latent cell holds 4 x 4 pixels. Where it held 8 x 8 of a page of 128 pixels, a
        # training of 17 minutes lost the things' colours (recipes/LOG.md).
        vae_channels=(32, 64, 128),
        reuse=3,  # eight times, and it begins to know them by heart (recipes/LOG.md)
        ema=0.998,
    ),
    "h100": Preset(
        size=256,
        vae=StageConfig(steps=1_000_000, minutes=6, batch=32, lr=1e-3),
        clip=StageConfig(steps=1_000_000, minutes=2.5, batch=512, lr=1e-3),
        unet=StageConfig(steps=1_000_000, minutes=17.5, batch=256, lr=1e-3),
        lm=StageConfig(steps=20_000, minutes=6, batch=64, lr=4e-3),
        vae_channels=(32, 48, 96, 112),
        pool=16384,
        reuse=4,
        ema=0.9995,
        workers=15,
        save_every=60.0,
    ),
}


# --- drawn data ---------------------------------------------------------------------------------


class Pages(torch.utils.data.IterableDataset):
    """Batches drawn from the storybook, an endless stream in which batch k is the same on every machine.

    `kind` "page" yields {"image"}; "pair" yields {"before", "after"} as uint8 [batch, 3, size, size] with
    the lists "instruction", "caption" (of the page before) and "edited_caption".
    """

    def __init__(self, kind: str, batch: int, size: int, seed: int, start: int = 0) -> None:
        self.kind, self.batch, self.size, self.seed, self.start = kind, batch, size, seed, start

    def make(self, index: int) -> dict[str, Any]:
        from ip2p_storybook.captions import caption
        from ip2p_storybook.draw import draw
        from ip2p_storybook.edits import sample_edit
        from ip2p_storybook.scene import sample_scene

        def pixels(scene: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(draw(scene, self.size).transpose(2, 0, 1)))

        rngs = [rng_for("train", self.kind, self.seed, index, i) for i in range(self.batch)]
        if self.kind == "page":
            scenes = [sample_scene(rng) for rng in rngs]
            # Training's pages have even seeds, all others odd ones (`edits.sample_edit`).
            return {"image": torch.stack([pixels(replace(s, seed=s.seed & ~1)) for s in scenes])}
        edits = [sample_edit(rng) for rng in rngs]
        return {
            "before": torch.stack([pixels(e.before) for e in edits]),
            "after": torch.stack([pixels(e.after) for e in edits]),
            "instruction": [e.instruction for e in edits],
            "caption": [caption(e.before, rng) for e, rng in zip(edits, rngs, strict=True)],
            "edited_caption": [caption(e.after, rng) for e, rng in zip(edits, rngs, strict=True)],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        first, step = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.make(first)
            first += step


def stream(pages: torch.utils.data.IterableDataset, workers: int, ahead: int = 8) -> Iterator[Any]:
    """The batches, about `ahead` of them drawn beforehand by the workers."""
    loader = torch.utils.data.DataLoader(
        pages,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
    )
    return iter(loader)


def to_signed(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [batch, 3, h, w] to float in [-1, 1]."""
    return pixels.to(device, non_blocking=True).float() / 127.5 - 1


# --- what all stages share ----------------------------------------------------------------------


class OutOfTime(Exception):
    """This call's seconds are used up; the state is on disk."""


@dataclass
class Run:
    """What all stages share: where, on what, until when, and what was logged."""

    preset: Preset
    name: str
    output: Path
    device: torch.device
    deadline: float | None
    log: Callable[[str], None]

    @property
    def state_dir(self) -> Path:
        return self.output / "state"

    def done(self, stage: str) -> bool:
        return (self.state_dir / f"{stage}.done.json").exists()


def train_stage(
    run: Run,
    stage: str,
    task: nn.Module,
    config: StageConfig,
    batches: Callable[[int], Iterator[list[Any]]],
    precision: str = "bf16",
) -> dict[str, Any]:
    """Train to the stage's end (`train.loop.fit`). Raises OutOfTime when this call's time is up."""
    result = fit(
        task,
        batches,
        LoopConfig(
            steps=config.steps,
            minutes=config.minutes,
            batch=config.batch,
            lr=config.lr,
            schedule="cosine",
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            decay_vectors=False,
            betas=(0.9, 0.99),
            clip_norm=config.clip_norm,
            ema=run.preset.ema,
            nan_steps=10,
            save_every=None,
            save_seconds=run.preset.save_every,
        ),
        folder=run.state_dir / stage,
        accelerator=new_accelerator(run.device, precision),
        fingerprint=_fingerprint(run, stage),
        name=stage,
        deadline=run.deadline,
        say=run.log,
    )
    if not result.finished:
        raise OutOfTime
    return {
        "steps": result.step,
        "samples": result.step * config.batch,
        "minutes": round(result.seconds / 60, 1),
        "curve": result.curve,
        "config": asdict(config),
    }


def _fingerprint(run: Run, stage: str) -> dict[str, Any]:
    """The numbers that must not change under a resumed stage (its own length and pace of saving may)."""
    shape = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in asdict(run.preset).items()
        if k not in (*STAGES, "workers", "save_every")
        # The language model shares no numbers with the other stages.
        and (k.startswith("lm_") or k in ("ema", "seed") if stage == "lm" else not k.startswith("lm_"))
    }
    own = asdict(getattr(run.preset, stage))
    return {"preset": run.name, **shape, "batch": own["batch"], "lr": own["lr"]}


def _finish(run: Run, stage: str, summary: dict[str, Any]) -> None:
    run.state_dir.mkdir(parents=True, exist_ok=True)
    write_text(run.state_dir / f"{stage}.done.json", json.dumps(summary, indent=1) + "\n")


# --- the stages ---------------------------------------------------------------------------------


def new_vae(preset: Preset) -> nn.Module:
    from diffusers import AutoencoderKL

    n = len(preset.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=preset.vae_channels,
        layers_per_block=preset.vae_layers,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=preset.size,
    )


class VaeTask(nn.Module):
    """An autoencoder's loss on pictures in [-1, 1] [batch, 3, h, w], given the noise of their latents."""

    def __init__(self, vae: Any, preset: Preset) -> None:
        super().__init__()
        self.vae, self.preset = vae, preset

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        x, noise = (part.to(self.vae.device) for part in batch)
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        y = self.vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
        # The absolute error keeps edges, the square adds what PSNR counts. Differences between the
        # channels count apart: a small thing's hue is a small error, and else is learnt last.
        off = y - x
        hue = (off[:, :2] - off[:, 1:]).abs().mean()
        error = off.abs().mean() + 2 * off.square().mean() + self.preset.hue_weight * hue
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = signed_psnr(off.detach().square().mean())
        return error + self.preset.kl_weight * kl, {"kl": float(kl.detach()), "psnr": float(psnr)}


def train_vae(run: Run) -> None:
    preset = run.preset
    torch.manual_seed(preset.seed)
    vae = new_vae(preset).to(run.device)
    if run.device.type == "cuda":  # on a CPU this layout's group norms train slower
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = preset.size // 2 ** (len(preset.vae_channels) - 1)

    def batches(first: int) -> Iterator[list[Any]]:
        pages = Pages("page", preset.vae.batch, preset.size, preset.seed, first)
        for step, batch in enumerate(stream(pages, preset.workers), first):
            generator = torch.Generator().manual_seed(place_seed("vae", preset.seed, step))
            noise = torch.randn((preset.vae.batch, 4, side, side), generator=generator)
            yield [(to_signed(batch["image"], run.device), noise)]

    summary = train_stage(run, "vae", VaeTask(vae, preset), preset.vae, batches)
    scale, known = measure_vae(vae, run)
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(run.output / "vae")
    _finish(run, "vae", {**summary, "scaling_factor": scale, "known_psnr": known})


@torch.no_grad()
def measure_vae(vae: nn.Module, run: Run) -> tuple[float, float]:
    """On 256 new pages: one over the latents' standard deviation, and the PSNR in dB that 2% stay below.

    A picture below that PSNR is unlike the pages that the autoencoder was trained on.
    """
    means, psnrs = [], []
    for index in range(8):
        pages = Pages("page", 32, run.preset.size, run.preset.seed + 1).make(index)
        x = to_signed(pages["image"], run.device)
        mean = vae.encode(x).latent_dist.mode()
        off = vae.decode(mean).sample.clamp(-1, 1) - x
        means.append(mean)
        psnrs.append(signed_psnr(off.square().mean(dim=(1, 2, 3))))
    return 1 / float(torch.cat(means).std()), round(float(torch.cat(psnrs).quantile(0.02)), 1)


def make_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer: each word of the storybook's language is one token, other words fall into bytes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    from ip2p_storybook.language import vocabulary

    bpe = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = sorted({w for entry in vocabulary() for w in entry.lower().split()})
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TEXT_TOKENS
    )
    tokenizer.save_pretrained(folder)


def new_clip(preset: Preset, tokenizer: Any) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    width = preset.clip_width
    shared = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": max(1, width // 48),
        "projection_dim": width,
    }
    text = {
        **shared,
        "num_hidden_layers": preset.clip_layers[0],
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {
        **shared,
        "num_hidden_layers": preset.clip_layers[1],
        "image_size": preset.clip_pixels,
        "patch_size": preset.clip_patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def clip_loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss over a batch (Radford et al. 2021, figure 3)."""
    logits = scale * a @ b.T
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class ClipTask(nn.Module):
    """Captions against pictures, and instructions against the direction from one picture to the other.

    The second term teaches the text tower what instructions mean; the UNet is conditioned on it.
    Page and edited page stand in the same batch, each the other's hard negative.
    """

    def __init__(self, clip: Any, tokenizer: Any, preset: Preset) -> None:
        super().__init__()
        self.clip, self.preset, self.tokens = clip, preset, read_tokens(tokenizer)

    def images(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.clip.device).float() / 255
        if x.shape[-1] != self.preset.clip_pixels:
            x = F.interpolate(x, size=self.preset.clip_pixels, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.clip.visual_projection(self.clip.vision_model((x - mean) / std).pooler_output).float()

    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokens(texts).text.to(self.clip.device)
        return self.clip.text_projection(self.clip.text_model(tokens).pooler_output).float()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        n = len(batch["before"])
        images = self.images(torch.cat([batch["before"], batch["after"]]))
        texts = self.texts([*batch["caption"], *batch["edited_caption"], *batch["instruction"]])
        with torch.autocast(images.device.type, enabled=False):
            scale = self.clip.logit_scale.exp().clamp(max=100)
            captions, instructions = F.normalize(texts[: 2 * n], dim=-1), F.normalize(texts[2 * n :], dim=-1)
            unit = F.normalize(images, dim=-1)
            direction = F.normalize(unit[n:] - unit[:n], dim=-1, eps=1e-4)
            image_text = clip_loss(unit, captions, scale)
            edit = clip_loss(direction, instructions, scale.detach().clamp(max=30))
            hits = ((unit @ captions.T).argmax(1).cpu() == torch.arange(2 * n)).float().mean()
        return image_text + 0.5 * edit, {"edit": float(edit.detach()), "top1": float(hits)}


def train_clip(run: Run) -> None:
    from transformers import CLIPTokenizer

    preset = run.preset
    if not (run.output / "tokenizer").exists():
        make_tokenizer(run.output / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(run.output / "tokenizer")
    torch.manual_seed(preset.seed)
    clip: Any = new_clip(preset, tokenizer).to(run.device)
    if run.device.type == "cpu":
        # The fused kernel's backward pass is the slower one on a CPU at these lengths.
        clip.set_attn_implementation("eager")

    def batches(first: int) -> Iterator[list[Any]]:
        pairs = Pages("pair", preset.clip.batch, preset.size, preset.seed + 2, first)
        return ([batch] for batch in stream(pairs, preset.workers))

    summary = train_stage(run, "clip", ClipTask(clip, tokenizer, preset), preset.clip, batches)
    clip.save_pretrained(run.output / "clip")
    _text_encoder(clip).save_pretrained(run.output / "text_tower")
    _finish(run, "clip", summary)


TEXT_TOKENS = 48  # 99% of the captions and every instruction fit


def _text_encoder(clip: nn.Module) -> nn.Module:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel(clip.config.text_config)
    own = {
        k.removeprefix("text_model."): v for k, v in clip.state_dict().items() if k.startswith("text_model.")
    }
    target = encoder.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in target) else ""
    encoder.load_state_dict({prefix + k: v for k, v in own.items()})
    return encoder.eval()


def new_unet(preset: Preset) -> nn.Module:
    from diffusers import UNet2DConditionModel

    levels = len(preset.unet_channels)
    return UNet2DConditionModel(
        sample_size=preset.size // 2 ** (len(preset.vae_channels) - 1),
        in_channels=8,
        out_channels=4,
        # The finest level attends on the way up only, where the edit is decided: what moves or grows is
        # copied from cell to cell. On the way down it costs most and helps least.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=preset.unet_channels,
        layers_per_block=preset.unet_layers,
        cross_attention_dim=preset.clip_width,
        # diffusers' name for the number of heads
        attention_head_dim=(max(1, preset.heads // 2), *(preset.heads,) * (levels - 1)),
        norm_num_groups=16,
    )


def train_unet(run: Run) -> None:
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizer

    preset, device = run.preset, run.device
    vae = AutoencoderKL.from_pretrained(run.output / "vae").to(device).eval().requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(run.output / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(run.output / "text_tower").to(device)
    torch.manual_seed(preset.seed)
    further = (run.output / "start" / "unet").exists()
    unet: Any = _start_unet(run) if further else new_unet(preset)
    data_seed = preset.seed + 3
    if further:  # it shall see new pages, each time that it goes further
        before = json.loads((run.state_dir / "start.done.json").read_text())["unet"] or {}
        data_seed += 1000 + int(before.get("steps", 0))
    unet = unet.to(device)
    if device.type == "cpu":
        # As in CLIP: plain attention trains faster on a CPU.
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    recognition = None
    if preset.recognition:
        recognition = Recognition(
            preset.unet_channels[-2],
            preset.clip_width,
            THING_SIZES,
            PAGE_SIZES,
            EDIT_SIZES,
            preset.recognition,
        )
        recognition.watch(unet)
    objective = Objective(
        prediction=preset.prediction,
        snr_clip=preset.snr_clip,
        timestep_power=preset.timestep_power,
        change_share=preset.change_share,
        change_weight_most=preset.change_weight_most,
        caption_share=preset.caption_share,
    )
    task = EditTask(
        unet,
        scaled_linear_alpha_bar(),
        objective,
        latent_scale=vae.config.scaling_factor,
        text_encoder=text_encoder if preset.train_text else None,
        aside=recognition,
    )

    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode_pictures(vae, pixels, autocast=torch.bfloat16)
        return mean.contiguous(), std.contiguous()

    @torch.no_grad()
    def hidden(texts: list[str]) -> Words:
        return Words(text_encoder(tokens(texts).text.to(device)).last_hidden_state)

    tokens = read_tokens(tokenizer)
    samples = PooledSamples(
        StorybookSource(preset.size, seed=data_seed),
        tokens if preset.train_text else hidden,
        # Mirrored, a page would disagree with its labels.
        Transform(size=(preset.size, preset.size), flip=False),
        encode,
        objective,
        Share(batch=preset.unet.batch, micro=preset.unet.batch),
        seed=data_seed,
        pool=preset.pool,
        reuse=preset.reuse,
        workers=preset.workers,
    )
    summary = train_stage(run, "unet", task, preset.unet, samples)
    unet.save_pretrained(run.output / "unet", max_shard_size="15MB")
    text_encoder.save_pretrained(run.output / "text_encoder")
    _finish(run, "unet", summary)


# --- the language model ---


class Triples(torch.utils.data.IterableDataset):
    """Batches of exact triples in tokens, (tokens, labels) [batch, longest], in groups of GROUPED.

    Group k is the same on every machine. Those of a batch are alike in length, so that little is padded.
    None is such as `ip2p synth instruct` would refuse: "add a tree on the left" it takes for a spatial edit.
    """

    GROUPED = 8

    def __init__(self, tokenizer: Any, batch: int, seed: int, start: int = 0) -> None:
        self.tokenizer, self.batch, self.seed, self.start = tokenizer, batch, seed, start

    def make(self, group: int) -> list[tuple[Tensor, Tensor]]:
        count = self.batch * self.GROUPED
        # About a third is left out. Three times as many as are wanted are surely enough.
        drawn = exact_triples(3 * count, self.seed, first=3 * count * group)
        plain = (to_learn(triple) for triple in drawn if is_plain(triple))
        taken = (triple for triple in plain if reject(triple) is None)
        rows = sorted((row_of(triple, self.tokenizer) for triple in islice(taken, count)), key=len)
        # What pads stands behind the rest, where nothing looks at it.
        made = (
            batch_of(rows[first : first + self.batch], self.tokenizer.pad_token_id)
            for first in range(0, count, self.batch)
        )
        batches = [(tokens, labels) for tokens, _, labels in made]
        rng_for("triples", self.seed, group).shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        info = torch.utils.data.get_worker_info()
        first, step = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.make(first)
            first += step


_PRONOUNS = frozenset(("it", "its", "he", "him", "his", "she", "her", "they", "them", "their"))
_VAGUE_NAMES = frozenset(("thing", "things", *KINDS, *map(plural, KINDS), *OTHER_NOUNS.values()))


def is_plain(exact: ExactTriple) -> bool:
    """Whether the instruction calls things what their captions call them.

    "The cat", and not "it" or "the animal": a small model is never sure on which pages those will do.
    """
    for step in exact.edit.steps or (exact.edit,):
        words = set(words_of(step.instruction))
        if words & _VAGUE_NAMES or (step.target is not None and step.kind != "count" and words & _PRONOUNS):
            return False
    return True


def to_learn(exact: ExactTriple) -> Triple:
    """A triple as the language model learns it: its instruction has one capital and no stop.

    Words LIKE THESE Or These are no tokens, so that it would have to learn to spell; and each thing of no
    account that it has to guess hides what it gets wrong.
    """
    text = exact.instruction.rstrip(".?")
    words = text.split()
    if text.isupper() or (len(words) > 1 and all(not word[0].islower() for word in words)):
        text = text.lower()
    return Triple(
        id=exact.id,
        caption=exact.caption,
        instruction=text[0].upper() + text[1:],
        edited_caption=exact.edited_caption,
    )


class LmTask(nn.Module):
    """A language model's loss a token of the answers; those of the edited captions weigh `edited` times more.

    There are hundreds of ways to edit a caption, and no model can know which comes; but what the caption is
    after an edit follows from it, and that is where a model is right or wrong.
    """

    def __init__(self, lm: Any, tokenizer: Any, edited: float) -> None:
        super().__init__()
        self.lm, self.edited = lm, edited
        self.middle = tokenizer.convert_tokens_to_ids(MIDDLE)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens, labels = (part.to(self.lm.device) for part in batch)
        hidden = self.lm.model(input_ids=tokens).last_hidden_state[:, :-1]
        after = (tokens == self.middle).cumsum(1)[:, :-1] > 0
        labels = labels[:, 1:]
        learnt = labels != IGNORED
        logits = self.lm.lm_head(hidden[learnt]).float()
        losses = F.cross_entropy(logits, labels[learnt], reduction="none")
        after = after[learnt]
        weights = torch.where(after, self.edited, 1.0)
        told = {"instruction": losses[~after].mean(), "edited": losses[after].mean()}
        return (losses * weights).sum() / weights.sum(), {k: float(v.detach()) for k, v in told.items()}


def train_lm(run: Run) -> None:
    preset = run.preset
    seed = preset.seed + 4
    if not (run.output / "lm_start").exists():
        told = (to_learn(triple) for triple in exact_triples(preset.lm_texts, seed + 1))
        new_lm(
            (text for one in told for text in (one.caption, one.instruction)),
            run.output / "lm_start",
            vocabulary=LM_TOKENS,
            width=preset.lm_width,
            layers=preset.lm_layers,
            heads=preset.lm_heads,
            inner=preset.lm_inner,
            phrases=phrases(),
            seed=preset.seed,
        )
    lm, tokenizer = load_lm(run.output / "lm_start")

    def batches(first: int) -> Iterator[list[Any]]:
        group, done = divmod(first, Triples.GROUPED)
        groups = stream(Triples(tokenizer, preset.lm.batch, seed, group), preset.workers, ahead=2)
        return ([batch] for batch in islice(chain.from_iterable(groups), done, None))

    # Its products are so small that half precision costs more than it saves.
    summary = train_stage(
        run, "lm", LmTask(lm, tokenizer, preset.lm_edited), preset.lm, batches, precision="no"
    )
    card = {"made_by": "ip2p storybook build", **{key: summary[key] for key in TOLD}}
    save_lm(lm.half(), tokenizer, run.output / PACKAGED_LM, card)
    _finish(run, "lm", summary)


LM_TOKENS = 600  # the words of captions and instructions, and the letters that spell all others


# --- starting from a model that is there ---


def start_from(run: Run, model: str) -> None:
    """Lay a trained bundle's parts into a new build, so that its UNet is trained further.

    Autoencoder, CLIP and tokenizer count as finished, and so does its language model, if it has one.
    Raises InputError when the build has begun already, ModelError when the model is of other numbers than
    the preset.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from ip2p.models.bundle import find_model

    folder = find_model(model)
    if run.done("vae") or (run.state_dir / "vae").exists():
        if (run.output / "start").exists():
            _take_lm(run, folder)
            return  # the same call again goes on
        raise InputError(f"{run.output} holds a build already; --start needs a new folder: --out OTHER")
    try:
        card = json.loads((folder / "ip2p.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except OSError as error:
        raise ModelError(
            f"{folder} was not made by ip2p storybook build: {error.filename} is missing"
        ) from None
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    wanted = new_unet(run.preset)
    shapes = {k: v.shape for k, v in wanted.state_dict().items()}
    if (
        {k: v.shape for k, v in unet.state_dict().items()} != shapes
        or card["native_size"] != run.preset.size
        or scheduler.get("prediction_type", "epsilon") != run.preset.prediction
    ):
        raise ModelError(
            f"{model} was built with preset {card.get('preset')!r} at {card['native_size']} px and does not "
            f"fit preset {run.name!r}; train it further with its own preset"
        )
    AutoencoderKL.from_pretrained(folder / "vae").float().save_pretrained(run.output / "vae")
    CLIPModel.from_pretrained(folder / "clip").float().save_pretrained(run.output / "clip")
    CLIPTextModel.from_pretrained(folder / "text_encoder").float().save_pretrained(run.output / "text_tower")
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(run.output / "tokenizer")
    unet.save_pretrained(run.output / "start" / "unet")
    for stage in ("vae", "clip"):
        _finish(run, stage, {**card["trained"][stage], "known_psnr": card.get("known_psnr")})
    _take_lm(run, folder)
    _finish(run, "start", {"unet": card["trained"].get("unet")})


def _take_lm(run: Run, folder: Path) -> None:
    """Take a model's language model over as finished, if it has one and the build has none under way."""
    if (folder / PACKAGED_LM).is_dir() and not (run.done("lm") or (run.state_dir / "lm").exists()):
        shutil.copytree(folder / PACKAGED_LM, run.output / PACKAGED_LM)
        _finish(run, "lm", _told_of_lm(folder / PACKAGED_LM))


def _told_of_lm(folder: Path) -> dict[str, Any]:
    """How long a language model was trained, as its folder says."""
    told = json.loads((folder / LM_CARD).read_text())
    return {key: told[key] for key in TOLD if key in told}


def _start_unet(run: Run) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(run.output / "start" / "unet")


# --- putting it together ------------------------------------------------------------------------


def save_bundle(source: Path, target: Path, *, name: str, card: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the trained parts as one diffusers folder in half precision, in shards under 16 MiB.

    An unfinished UNet stage counts with the moving average of its newest state.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[name]
    if (source / "unet").exists() and (source / "text_encoder").exists():
        unet = UNet2DConditionModel.from_pretrained(source / "unet")
        text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder")
    else:
        state = Checkpoints(source / "state" / "unet").load()
        if state is None:
            raise InputError(
                f"{source} holds no trained UNet yet; run: ip2p storybook build --output {source}"
            )
        unet = new_unet(replace(preset, size=state["fingerprint"]["size"]))
        text_encoder = CLIPTextModel.from_pretrained(source / "text_tower")
        average = state["ema"]["average"]
        for part, module in (("unet", unet), ("text_encoder", text_encoder)):
            own = {k.removeprefix(part + "."): v for k, v in average.items() if k.startswith(part + ".")}
            if own:  # the text encoder is there only where it was trained along
                module.load_state_dict(own)
    kept = {}  # that other hands wrote, or an earlier build
    if (target / "README.md").exists():
        kept["README.md"] = target / "README.md"
    lm = next((folder / PACKAGED_LM for folder in (source, target) if (folder / PACKAGED_LM).is_dir()), None)
    if lm is not None:
        kept[PACKAGED_LM] = lm
        card = {**card, "trained": {**card.get("trained", {}), "lm": _told_of_lm(lm)}}
    write_editor(
        target,
        {
            "unet": unet,
            "vae": AutoencoderKL.from_pretrained(source / "vae"),
            "text_encoder": text_encoder,
            "clip": CLIPModel.from_pretrained(source / "clip"),
        },
        {"tokenizer": CLIPTokenizer.from_pretrained(source / "tokenizer")},
        edit_scheduler(
            {
                "beta_start": BETA_START,
                "beta_end": BETA_END,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": TIMESTEPS,
                "prediction_type": preset.prediction,
            }
        ),
        dtype=dtype,
        card=card,
        shard=15_000_000,
        files=kept,
    )


def run(
    preset_name: str,
    output: str | os.PathLike[str],
    *,
    seconds: float | None = None,
    stage: str = "all",
    device: str = "auto",
    steps: int | None = None,
    start: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] | None = None,
) -> bool:
    """Build, or go on building. True when all asked stages are finished, False when the time ran out first.

    `seconds` is the time of this call alone; `steps` caps every stage's steps (for tests of a large preset).
    `start` names a trained bundle of the same preset whose UNet is trained further (`start_from`).
    `bundle` receives the half-precision folder as it stands at the end of the call, finished or not.
    """
    from ip2p.base.devices import pick_device

    if preset_name not in PRESETS:
        raise InputError(f"unknown preset {preset_name!r}; choose one of: {', '.join(PRESETS)}")
    if stage not in ("all", *STAGES):
        raise InputError(f"unknown stage {stage!r}; choose one of: all, {', '.join(STAGES)}")
    started = time.monotonic()
    preset = PRESETS[preset_name]
    if steps is not None:
        preset = replace(
            preset,
            pool=max(preset.unet.batch, 64) if steps < 64 else preset.pool,
            **{s: replace(getattr(preset, s), steps=steps) for s in STAGES},
        )
    here = Run(
        preset=preset,
        name=preset_name,
        output=Path(output),
        device=torch.device(pick_device(device)),
        deadline=None if seconds is None else started + seconds,
        log=log or (lambda text: print(text, file=sys.stderr, flush=True)),
    )
    here.output.mkdir(parents=True, exist_ok=True)
    if here.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    finished = True
    with lock_folder(here.output):
        if start is not None:
            start_from(here, start)
        for name, train in zip(STAGES, (train_vae, train_clip, train_unet, train_lm), strict=True):
            if stage not in ("all", name):
                continue
            if here.done(name):
                here.log(f"{name}: finished already")
                continue
            try:
                train(here)
            except OutOfTime:
                here.log(f"{name}: time is up; the same command goes on from here")
                finished = False
                break
        if bundle is not None and (here.output / "clip").exists():
            with contextlib.suppress(InputError):
                save_bundle(here.output, Path(bundle), name=preset_name, card=card(here), dtype=torch.float16)
    return finished


def card(run: Run) -> dict[str, Any]:
    """What the model is and how it was made, as `ip2p.json` beside the weights.

    An unfinished UNet stage is told as far as it went; one that started from a trained model adds to it.
    """

    def told(stage: str) -> dict[str, Any]:
        path = run.state_dir / f"{stage}.done.json"
        return json.loads(path.read_text()) if path.exists() else {}

    made = {s: {k: told(s)[k] for k in TOLD} for s in STAGES if told(s)}
    if "unet" not in made:
        state = Checkpoints(run.state_dir / "unet").load()
        if state is not None:
            batch = run.preset.unet.batch
            minutes = round(state["seconds"] / 60, 1)
            made["unet"] = {"steps": state["step"], "samples": state["step"] * batch, "minutes": minutes}
    before = told("start").get("unet")
    if before and "unet" in made:
        made["unet"] = {k: round(v + before[k], 1) for k, v in made["unet"].items()}
    return {
        "name": "storybook",
        "native_size": run.preset.size,
        "known_psnr": told("vae").get("known_psnr"),
        "preset": run.name,
        "trained": made,
    }
