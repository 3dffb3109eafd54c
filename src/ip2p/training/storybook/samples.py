"""The editor's samples: pairs of pages from shards whose latents are encoded once and saved on disk.

Training consists of blocks. The pool of a block has `fresh` new shards and some earlier ones; pairs are
sampled from it so that each kind of edit has its share. Everything in step k depends only on the seed and k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ip2p.base.files import replacing
from ip2p.training.cache import encode_pictures, weights_key
from ip2p.training.loss import null_conditions, random_timesteps
from ip2p.training.objective import Draws, EditBatch, Objective, place_seed
from ip2p.training.storybook.data import Shards, World, read_ahead
from ip2p.training.storybook.presets import PoolConfig, kind_shares
from ip2p_storybook.edits import EDIT_KINDS
from ip2p_storybook.labels import IGNORED

FULL_NOISE = 999
AHEAD = 50  # blocks whose shards the workers draw, one block ahead


class LatentShards:
    """Shards of a world with the latents of their pages in half precision, made on demand in `folder`.

    vae: the latents are its modes; another encoder gets its own files.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        vae: Any,
        tokens: Callable[[list[str]], Tensor],
        *,
        workers: int,
        precision: str = "no",
    ) -> None:
        self.world, self.vae, self.tokens, self.workers = world, vae, tokens, workers
        self.autocast = torch.bfloat16 if precision == "bf16" else None
        key = place_seed("shards", sorted(asdict(world).items(), key=str), weights_key(vae.encoder))
        self.folder = folder / f"{key:016x}"
        self._ahead: tuple[list[int], Iterator[dict[str, Tensor]]] = ([], iter(()))

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.pt"

    def make(self, numbers: list[int], then: list[int]) -> None:
        """Draw and encode the shards that are not on disk. then: the shards that the workers draw next."""
        missing = [number for number in numbers if not self.path(number).exists()]
        drawn, made = self._ahead
        for number in missing:
            if not drawn or drawn[0] != number:
                # The loader keeps this order.
                drawn = [*missing[missing.index(number) :], *(n for n in then if not self.path(n).exists())]
                made = read_ahead(Shards(self.world, drawn, self.tokens), self.workers, ahead=len(missing))
            self._write(drawn.pop(0), next(made))
        self._ahead = drawn, made

    def _write(self, number: int, shard: dict[str, Tensor]) -> None:
        pixels = shard.pop("pixels")
        means = [encode_pictures(self.vae, part, autocast=self.autocast)[0] for part in pixels.split(32)]
        shard["latents"] = torch.cat(means).half().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(number)) as temporary:
            torch.save(shard, temporary)

    def read(self, number: int) -> dict[str, Tensor]:
        return torch.load(self.path(number), weights_only=True)  # type: ignore[no-any-return]


class Pool:
    """Several shards joined: `pages` by page number and `pairs` by pair number, on a device."""

    PAGES = ("latents", "cells", "things", "page", "captions")
    PAIRS = ("kind", "changed", "words", "edit")

    def __init__(self, shards: list[dict[str, Tensor]], device: torch.device) -> None:
        first = 0
        before, after = [], []
        for shard in shards:
            before.append(shard["before"] + first)
            after.append(shard["after"] + first)
            first += len(shard["latents"])

        def joined(key: str) -> Tensor:
            return torch.cat([shard[key] for shard in shards]).to(device)

        self.pages = {key: joined(key) for key in self.PAGES}
        self.pairs = {key: joined(key) for key in self.PAIRS}
        self.before, self.after = torch.cat(before).to(device), torch.cat(after).to(device)

    def weights(self, kinds: Mapping[str, float]) -> Tensor:
        """Sampling weights of the pairs, so that kinds are drawn in the given proportions."""
        counts = torch.bincount(self.pairs["kind"], minlength=len(EDIT_KINDS)).clamp(min=1)
        shares = torch.tensor([kinds[kind] for kind in EDIT_KINDS], device=counts.device)
        return (shares / counts)[self.pairs["kind"]]

    def batch(
        self, rows: Tensor, draws: Draws, wording: Tensor, empty: Tensor, weight: float = 1.0
    ) -> EditBatch:
        """The pairs `rows` as a batch. wording: selects the instruction and the caption of each, [batch]."""
        before, after = self.before[rows], self.after[rows]
        words, captions = self.pairs["words"][rows], self.pages["captions"][after]
        line = torch.arange(len(rows), device=rows.device)
        text = words[line, wording % words.shape[1]].long()
        text = torch.where(draws.text_null[:, None], empty, text)
        caption = captions[line, wording % captions.shape[1]].long()
        text = torch.where(draws.caption_only[:, None], caption, text)
        zero = torch.zeros((), device=rows.device)
        labels = {"edit": self.pairs["edit"][rows].long(), "weight": torch.tensor(weight)}
        for name, page in (("before", before), ("after", after)):
            things = self.pages["things"][page].long()
            labels[f"{name}_cells"] = self.pages["cells"][page].long()
            labels[f"{name}_things"] = torch.where(things < 0, IGNORED, things)
            labels[f"{name}_page"] = self.pages["page"][page].long()
        return EditBatch(
            before=self.pages["latents"][before].float(),
            # The mode is enough, because the posterior is narrow.
            mean=self.pages["latents"][after].float(),
            std=zero,
            draws=draws,
            text=text,
            ids=(),
            changed=self.pairs["changed"][rows][:, None].float(),
            labels=labels,
        )


def draw_step(
    count: int, shape: tuple[int, ...], objective: Objective, generator: torch.Generator, full_noise: bool
) -> Draws:
    """The draws of a step's samples, from one generator. full_noise: use the last timestep for all."""
    device = generator.device
    r, u, c = torch.rand((3, count), generator=generator, device=device)
    noise = torch.randn((count, *shape), generator=generator, device=device)
    text_null, image_null = null_conditions(r, objective.shares)
    caption_only = c < objective.caption_share
    timesteps = random_timesteps(u, objective.timestep_power)
    return Draws(
        posterior=torch.zeros((), device=device),
        noise=noise,
        timesteps=torch.full_like(timesteps, FULL_NOISE) if full_noise else timesteps,
        text_null=text_null,
        image_null=image_null | caption_only,
        caption_only=caption_only,
    )


class EditorSamples:
    """The batches of the editor's stages, for `training.loop.fit`.

    full_noise: as in `draw_step`. weight: of the perception heads' loss, by step. steps_before: steps of
    earlier stages; their new shards are not used as new ones again.
    """

    def __init__(
        self,
        shards: LatentShards,
        config: PoolConfig,
        objective: Objective,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        full_noise: bool,
        weight: Callable[[int], float],
        steps_before: int = 0,
    ) -> None:
        self.shards, self.config, self.objective = shards, config, objective
        self.batch, self.seed, self.device = batch, seed, device
        self.full_noise, self.weight = full_noise, weight
        self.steps_per_block = max(1, config.fresh * shards.world.pages * config.reuse // batch)
        self.blocks_before = -(-steps_before // self.steps_per_block)
        self.empty = shards.tokens([""]).to(device)

    def fresh(self, block: int) -> range:
        """The new shards of a block; none once there are `config.shards` shards."""
        first = (self.blocks_before + block) * self.config.fresh
        return range(min(first, self.config.shards), min(first + self.config.fresh, self.config.shards))

    def numbers(self, block: int) -> list[int]:
        """The shards of a block's pool: the new ones and some earlier ones."""
        fresh = self.fresh(block)
        generator = torch.Generator().manual_seed(place_seed("pool", self.seed, block))
        earlier = torch.randperm(fresh.start, generator=generator)[: self.config.pool - len(fresh)]
        return [*fresh, *earlier.tolist()]

    def __call__(self, first: int) -> Iterator[list[EditBatch]]:
        block, start = divmod(first, self.steps_per_block)
        while True:
            numbers = self.numbers(block)
            self.shards.make(
                numbers, then=[n for later in range(1, AHEAD) for n in self.fresh(block + later)]
            )
            pool = Pool([self.shards.read(number) for number in numbers], self.device)
            weights = pool.weights(kind_shares(self.shards.world.often))
            for k in range(start, self.steps_per_block):
                yield [self.make(pool, weights, block * self.steps_per_block + k)]
            block, start = block + 1, 0

    def make(self, pool: Pool, weights: Tensor, step: int) -> EditBatch:
        generator = torch.Generator(self.device).manual_seed(place_seed("step", self.seed, step))
        rows = torch.multinomial(weights, self.batch, replacement=True, generator=generator)
        wording = torch.randint(2**16, (self.batch,), generator=generator, device=self.device)
        shape = tuple(pool.pages["latents"].shape[1:])
        draws = draw_step(self.batch, shape, self.objective, generator, self.full_noise)
        return pool.batch(rows, draws, wording, self.empty, self.weight(step))
