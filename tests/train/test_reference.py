"""The trainer against a plain loop that does the same by hand, and against itself, split in other ways."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ip2p.models.base import load_base
from ip2p.storybook.source import StorybookSource
from ip2p.train.cache import build_cache
from ip2p.train.loop import LoopConfig, fit, new_accelerator
from ip2p.train.objective import EditTask, Objective
from ip2p.train.samples import CachedSamples, Share, Words
from ip2p.train.transform import Transform

SEED, LR, DECAY, BATCH, STEPS, ROWS = 5, 1e-3, 0.01, 8, 20, 12


def encode(bundle, texts: list[str]) -> torch.Tensor:
    tokens = bundle.tokenizer(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return bundle.text_encoder(tokens.input_ids)[0]


def plain_loop(folder: Path, cache=None):
    """The recipe with nothing of ours in it: diffusers' noise, torch's AdamW, every picture encoded again.

    AdamW's first steps are the learning rate times the sign of the gradient, also where that is rounding
    alone. So the latents, once they are found equal to the cache's to 1e-4, are replaced by those.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def seed_of(*parts):
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    words = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=DECAY)
    average = copy.deepcopy(unet)
    pages, losses = StorybookSource(64, seed=1, count=ROWS), []
    rng = __import__("numpy").random
    for step in range(STEPS):
        rows = []
        for place in range(step * BATCH, (step + 1) * BATCH):
            epoch, position = divmod(place, ROWS)
            pair = pages[int(rng.default_rng(seed_of("epoch", SEED, epoch)).permutation(ROWS)[position])]
            sided = {"left", "right"} & set(re.findall("[a-z]+", pair.instruction.lower()))
            mirrored = seed_of("variant", SEED, place) % 2 and not sided
            g = torch.Generator().manual_seed(seed_of("sample", SEED, place))
            r, u, _ = torch.rand(3, generator=g)
            gauss = torch.randn((2, 4, 16, 16), generator=g)
            with torch.no_grad():
                pixels = [
                    torch.tensor(p).permute(2, 0, 1)[None] / 255 * 2 - 1 for p in (pair.before, pair.after)
                ]
                pixels = [p.flip(-1) if mirrored else p for p in pixels]
                before, after = (vae.encode(p).latent_dist for p in pixels)
                mode, mean, std = before.mode(), after.mean, after.std
                row = int(rng.default_rng(seed_of("epoch", SEED, epoch)).permutation(ROWS)[position])
                kept = cache.read([row], [int(bool(mirrored))])
                for mine, theirs in ((mode, kept.before), (mean, kept.mean), (std, kept.std)):
                    assert (mine - theirs).abs().max() < 1e-4
                mode, mean, std = kept.before, kept.mean, kept.std
                text = "" if r < 0.10 else pair.instruction
                tokens = tokenizer(
                    text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                )
                hidden = words(tokens.input_ids)[0]
            target = (mean + std * gauss[0]) * vae.config.scaling_factor
            image = torch.zeros_like(target) if 0.05 <= r < 0.15 else mode
            t = (u * 1000).long()[None]
            noisy = noise.add_noise(target, gauss[1][None], t)
            rows.append((torch.cat([noisy, image], 1), t, hidden, gauss[1][None]))
        given, t, hidden, wanted = (torch.cat(column) for column in zip(*rows, strict=True))
        loss = F.mse_loss(unet(given, t, hidden).sample, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        keep = min(0.9999, (2 + step) / (11 + step))
        with torch.no_grad():
            for old, new in zip(average.parameters(), unet.parameters(), strict=True):
                old.mul_(keep).add_(new, alpha=1 - keep)
        losses.append(loss.item())
    return losses, unet.state_dict(), average.state_dict()


def ours(folder: Path, work: Path, share: Share, *, steps: int = STEPS):
    """The same with the package's cache, samples, task and loop: losses, weights and averages."""
    bundle = load_base(folder)
    transform = Transform(size=(64, 64))
    pages = StorybookSource(64, seed=1, count=ROWS)
    accelerator = new_accelerator("cpu", "no")
    rank, world = accelerator.process_index, accelerator.num_processes
    cache = build_cache(pages, bundle, transform, work / "cache", dtype="fp32", rank=rank, world=world)

    def words(texts: list[str]) -> Words:
        with torch.no_grad():
            return Words(torch.cat([encode(bundle, [text]) for text in texts]))

    share = replace(share, rank=rank, world=world)
    kept = list(range(ROWS))
    samples = CachedSamples(cache, words, transform, Objective(), share, seed=SEED, kept=kept)
    from ip2p.diffusion.schedule import alpha_bar_from_config

    alpha_bar = alpha_bar_from_config(bundle.scheduler_config)
    task = EditTask(bundle.unet, alpha_bar, Objective(), latent_scale=bundle.latent_scale)
    weights = {}

    def note(step: int) -> bool:
        return False

    result = fit(
        task,
        samples,
        LoopConfig(steps=steps, batch=BATCH, lr=LR, weight_decay=DECAY, save_every=steps, log_seconds=0.0),
        folder=work / f"run-{share.micro}-{world}",
        accelerator=accelerator,
        fingerprint={},
        check=note,
    )
    from ip2p.train.checkpoints import Checkpoints

    state = Checkpoints(work / f"run-{share.micro}-{world}").load()
    weights = {k.removeprefix("unet."): v.clone() for k, v in state["model"].items()}
    average = {k.removeprefix("unet."): v.clone() for k, v in state["ema"]["average"].items()}
    return [row["loss"] for row in result.curve], weights, average, cache


def largest(a: dict, b: dict) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    return ours(tiny_model_dir, tmp_path_factory.mktemp("whole"), Share(batch=BATCH, micro=BATCH))


def test_twenty_steps_equal_a_plain_loop(whole, tiny_model_dir):
    told, own, own_average, cache = whole
    losses, weights, average = plain_loop(tiny_model_dir, cache)
    assert max(abs(a - b) for a, b in zip(losses, told, strict=True)) < 1e-6
    assert losses[0] != losses[-1]
    assert largest(weights, own) < 1e-6
    assert largest(average, own_average) < 1e-6
