"""The trainer against a plain training loop, and against itself with other batch splits."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ip2p.diffusion.schedule import alpha_bar_from_config
from ip2p.models.base import load_base
from ip2p.training.cache import build_cache
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loop import LoopConfig, fit, new_accelerator
from ip2p.training.objective import EditTask, Objective
from ip2p.training.samples import CachedSamples, Share, TextInput
from ip2p.training.storybook.source import StorybookSource
from ip2p.training.transform import Transform

SEED, LR, DECAY, BATCH, STEPS, ROWS = 5, 1e-3, 0.01, 8, 20, 12


def encode(bundle, texts: list[str]) -> torch.Tensor:
    tokens = bundle.tokenizer(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return bundle.text_encoder(tokens.input_ids)[0]


def plain_loop(folder: Path, cache=None):
    """The recipe without our package: diffusers' noise, torch's AdamW, every picture encoded again.

    AdamW's first steps are the learning rate times the sign of the gradient, even where the gradient is
    only a rounding error. So the latents are compared with the cache's to 1e-4 and replaced by those.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def seed_of(*parts):
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
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
                cached = cache.read([row], [int(bool(mirrored))])
                for mine, theirs in ((mode, cached.before), (mean, cached.mean), (std, cached.std)):
                    assert (mine - theirs).abs().max() < 1e-4
                mode, mean, std = cached.before, cached.mean, cached.std
                text = "" if r < 0.10 else pair.instruction
                tokens = tokenizer(
                    text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                )
                hidden = text_encoder(tokens.input_ids)[0]
            target = (mean + std * gauss[0]) * vae.config.scaling_factor
            image = torch.zeros_like(target) if 0.05 <= r < 0.15 else mode
            t = (u * 1000).long()[None]
            noisy = noise.add_noise(target, gauss[1][None], t)
            rows.append((torch.cat([noisy, image], 1), t, hidden, gauss[1][None]))
        inputs, t, hidden, targets = (torch.cat(column) for column in zip(*rows, strict=True))
        loss = F.mse_loss(unet(inputs, t, hidden).sample, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9999, (2 + step) / (11 + step))
        with torch.no_grad():
            for old, new in zip(average.parameters(), unet.parameters(), strict=True):
                old.mul_(decay).add_(new, alpha=1 - decay)
        losses.append(loss.item())
    return losses, unet.state_dict(), average.state_dict()


def ours(folder: Path, work: Path, share: Share, *, steps: int = STEPS, number: torch.dtype = torch.float32):
    """The same with the package's cache, samples, task and loop: losses, weights, averages, and the cache."""
    bundle = load_base(folder)
    transform = Transform(size=(64, 64))
    pages = StorybookSource(64, seed=1, count=ROWS)
    accelerator = new_accelerator("cpu", "no")
    rank, world = accelerator.process_index, accelerator.num_processes
    cache = build_cache(pages, bundle, transform, work / "cache", dtype="fp32", rank=rank, world=world)

    def encode_texts(texts: list[str]) -> TextInput:
        with torch.no_grad():
            return TextInput(torch.cat([encode(bundle, [text]) for text in texts]))

    share = replace(share, rank=rank, world=world)
    kept = list(range(ROWS))
    samples = CachedSamples(cache, encode_texts, transform, Objective(), share, seed=SEED, kept=kept)
    alpha_bar = alpha_bar_from_config(bundle.scheduler_config)
    task = EditTask(bundle.unet, alpha_bar, Objective(), latent_scale=bundle.latent_scale)
    task.to(number)

    def batches(first: int):
        for micro in samples(first):
            yield [batch.map(lambda t: t.to(number) if t.is_floating_point() else t) for batch in micro]

    run = work / f"run-{share.batch}-{share.micro}-{world}"
    result = fit(
        task,
        batches,
        LoopConfig(steps=steps, batch=share.batch, lr=LR, weight_decay=DECAY, log_seconds=0.0),
        folder=run,
        accelerator=accelerator,
        fingerprint={},
    )
    state = Checkpoints(run).load()
    weights = {k.removeprefix("unet."): v.clone() for k, v in state["model"].items()}
    average = {k.removeprefix("unet."): v.clone() for k, v in state["ema"]["average"].items()}
    return [row["loss"] for row in result.curve], weights, average, cache


def largest(a: dict, b: dict) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    return ours(tiny_model_dir, tmp_path_factory.mktemp("whole"), Share(batch=BATCH, micro=BATCH))


def test_twenty_steps_match_a_plain_loop(whole, tiny_model_dir):
    our_losses, our_weights, our_average, cache = whole
    losses, weights, average = plain_loop(tiny_model_dir, cache)
    assert max(abs(a - b) for a, b in zip(losses, our_losses, strict=True)) < 1e-6
    assert losses[0] != losses[-1]
    assert largest(weights, our_weights) < 1e-6
    assert largest(average, our_average) < 1e-6


# fp64: in fp32, AdamW turns rounding errors of zero gradients into steps of the learning rate's size.


@pytest.fixture(scope="module")
def four_steps_of_32(tiny_model_dir, tmp_path_factory):
    work = tmp_path_factory.mktemp("split")
    share = Share(batch=32, micro=32)
    return work, ours(tiny_model_dir, work, share, steps=4, number=torch.float64)


def test_four_micro_batches_of_8_match_a_batch_of_32(four_steps_of_32, tiny_model_dir):
    work, (losses, weights, average, _) = four_steps_of_32
    split = ours(tiny_model_dir, work, Share(batch=32, micro=8), steps=4, number=torch.float64)
    assert max(abs(a - b) for a, b in zip(losses, split[0], strict=True)) < 2e-6  # losses are logged to 1e-6
    assert largest(weights, split[1]) < 1e-9
    assert largest(average, split[2]) < 1e-6  # the averages are fp32


def test_two_processes_match_one_with_twice_the_batch(four_steps_of_32, tiny_model_dir, tmp_path):
    """accelerate over gloo, started by torchrun: `accelerate launch` starts several only on GPUs."""
    _, (losses, weights, _, _) = four_steps_of_32
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    worker = str(Path(__file__).with_name("two_processes.py"))
    process = subprocess.run(
        [sys.executable, *launch, worker, str(tiny_model_dir), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["world"] == 2
    assert max(abs(a - b) for a, b in zip(losses, two["losses"], strict=True)) < 2e-6
    assert largest(weights, two["weights"]) < 1e-9
