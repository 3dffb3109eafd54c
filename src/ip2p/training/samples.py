"""The samples of each step: from the latent cache, or from pictures that are encoded during training.

A run's samples form one endless sequence. The sample at position p is one row of the data, in one variant,
with one random draw; all of it depends only on p and the run's seed. Step k uses the positions from k · batch
on. So order, noise and dropout do not depend on how a batch is split over processes and micro-batches, and a
resumed run needs only its step number.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.base.files import append_row
from ip2p.data.records import BrokenRow, Pair, Source
from ip2p.training.objective import EditBatch, Objective, place_seed, random_draws
from ip2p.training.transform import Transform
from ip2p.training.workers import start_worker

if TYPE_CHECKING:
    from ip2p.models.text import Prompt
    from ip2p.training.cache import LatentCache

log = logging.getLogger("ip2p")

MAX_BROKEN = 0.01
QUARANTINE = "quarantine.jsonl"
CHUNK = 64  # rows that a worker process reads at once
# A mirrored picture would contradict these words.
_SIDED = re.compile(r"\b(left|right|clockwise|counterclockwise)\b", re.IGNORECASE)

T = TypeVar("T")


# --- order -------------------------------------------------------------------------------------


class Order:
    """Maps a position to one of `rows`: each epoch has every row once, in a new order.

    blocks: rows that are cheap to read together. Then the order of the blocks is random, and the order of
    the rows within each `window` of blocks.
    """

    def __init__(
        self,
        rows: Sequence[int],
        seed: int,
        *,
        blocks: Sequence[Sequence[int]] | None = None,
        window: int = 16,
    ) -> None:
        if not rows:
            raise InputError("no rows are left for training; check the data: ip2p data check PATH")
        self.rows, self.seed, self.blocks, self.window = rows, seed, blocks, window
        self._epoch: tuple[int, Any] = (-1, None)

    def __call__(self, place: int) -> int:
        epoch, position = divmod(place, len(self.rows))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return int(self._epoch[1][position])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(place_seed("epoch", self.seed, epoch))
        if self.blocks is None or len(self.blocks) < 2:
            return rng.permutation(np.asarray(self.rows))
        order = rng.permutation(len(self.blocks))
        parts = []
        for first in range(0, len(order), self.window):
            near = np.concatenate([np.asarray(self.blocks[k]) for k in order[first : first + self.window]])
            parts.append(rng.permutation(near))
        return np.concatenate(parts)


class PromptOrder:
    """Maps a position to one of `rows`: each epoch has every prompt once, with one of its pairs at random.

    So a prompt with four pairs has the same weight as a prompt with one, as in the released training.
    """

    def __init__(self, rows: Sequence[int], prompts: Sequence[str], seed: int) -> None:
        groups: dict[str, list[int]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            groups.setdefault(prompt, []).append(row)
        self.groups, self.seed = list(groups.values()), seed
        self.order = Order(range(len(self.groups)), seed)

    def __call__(self, place: int) -> int:
        group = self.groups[self.order(place)]
        return group[place_seed("pair", self.seed, place) % len(group)]


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of each step of `batch` samples; it processes `micro` samples at a time."""

    batch: int
    micro: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.micro * self.world):
            raise InputError(
                f"a batch of {self.batch} cannot be split into micro-batches of {self.micro} on {self.world} "
                f"processes; use a --batch that is a multiple of {self.micro * self.world}."
            )

    def places(self, step: int) -> list[range]:
        """The positions of this process's micro-batches."""
        stride = self.micro * self.world
        starts = range(step * self.batch + self.rank * self.micro, (step + 1) * self.batch, stride)
        return [range(start, start + self.micro) for start in starts]


def variant_of(place: int, seed: int, transform: Transform, instruction: str) -> int:
    """The variant at a position; a pair whose instruction names a side is not mirrored."""
    variant = place_seed("variant", seed, place) % transform.variants
    return variant & ~1 if transform.flip and _SIDED.search(instruction) else variant


# --- texts -------------------------------------------------------------------------------------


class TextInput(NamedTuple):
    """The fields of an `EditBatch` that hold its texts."""

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


Reader = Callable[[list[str]], TextInput]


def read_prompts(encode: Callable[[list[str]], Prompt]) -> Reader:
    """A reader of texts that a frozen encoder has encoded."""

    def read(texts: list[str]) -> TextInput:
        prompt = encode(texts)
        return TextInput(prompt.hidden, prompt.pooled, prompt.time_ids)

    return read


def chosen_texts(
    instructions: Sequence[str], captions: Sequence[str], text_null: Tensor, alone: Tensor
) -> list[str]:
    """Each sample's text after the dropout: the instruction, "", or (`alone`) the edited caption."""
    rows = zip(instructions, captions, text_null.tolist(), alone.tolist(), strict=True)
    return [caption if only else "" if null else instruction for instruction, caption, null, only in rows]


# --- from the cache ----------------------------------------------------------------------------


class CachedSamples:
    """Samples whose latents are cached on disk.

    kept: the positions in the cache to train on. ahead: prepare batches in a thread while the device works.
    """

    def __init__(
        self,
        cache: LatentCache,
        read_texts: Reader,
        transform: Transform,
        objective: Objective,
        share: Share,
        *,
        seed: int,
        kept: Sequence[int],
        ahead: bool = True,
    ) -> None:
        self.cache, self.read_texts, self.transform, self.objective = cache, read_texts, transform, objective
        self.share, self.seed, self.ahead = share, seed, ahead
        prompts = cache.prompts  # a property that builds the list at each access
        self.order = PromptOrder(kept, [prompts[place] for place in kept], seed)
        self.shape = cache.read([kept[0]], [0]).before.shape[1:]

    def batch(self, places: Sequence[int]) -> EditBatch:
        rows = [self.order(place) for place in places]
        instructions = [self.cache.instructions[row] for row in rows]
        captions = [self.cache.edited_captions[row] for row in rows]
        variants = [
            variant_of(place, self.seed, self.transform, text)
            for place, text in zip(places, instructions, strict=True)
        ]
        draws = random_draws(places, self.seed, self.shape, self.objective)
        texts = self.read_texts(chosen_texts(instructions, captions, draws.text_null, draws.caption_only))
        return EditBatch(
            **vars(self.cache.read(rows, variants)),
            **texts._asdict(),
            draws=draws,
            ids=[self.cache.ids[row] for row in rows],
        )

    def __call__(self, first: int) -> Iterator[list[EditBatch]]:
        """Yield the micro-batches of each step from `first` on."""

        def steps() -> Iterator[list[EditBatch]]:
            step = first
            while True:
                yield [self.batch(places) for places in self.share.places(step)]
                step += 1

        # On a CPU, a second thread would take cores from the network.
        return ahead(steps()) if self.ahead else steps()


def ahead(items: Iterator[T], size: int = 3) -> Iterator[T]:
    """Yield the items, up to `size` of which are prepared in a thread; its errors are raised here."""
    end: Any = object()
    worker = ThreadPoolExecutor(1)
    try:
        pending = deque(worker.submit(next, items, end) for _ in range(size))
        while (item := pending.popleft().result()) is not end:
            pending.append(worker.submit(next, items, end))
            yield item
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


# --- encoded during training -------------------------------------------------------------------


@dataclass(frozen=True)
class Pools:
    """The rows of each pool: `size` rows are used `reuse` times each, in an order that `seed` decides."""

    share: Share
    size: int
    reuse: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps per pool."""
        return self.size * self.reuse // self.share.batch

    def rows(self, turn: int) -> list[int]:
        """For each sample of pool number `turn`, over all processes, its row in the pool."""
        if self.reuse == 1:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(place_seed("pool", self.seed, turn))
        shuffled = [torch.randperm(self.size, generator=generator) for _ in range(self.reuse)]
        return torch.cat(shuffled).tolist()

    def needed(self, turn: int) -> list[int]:
        """The rows of the pool that this process's samples use, ascending."""
        rows = self.rows(turn)
        places = chain.from_iterable(self.share.places(step) for step in range(self.steps))
        return sorted({rows[place] for place in chain.from_iterable(places)})


class _Chunks(torch.utils.data.IterableDataset):
    """An endless stream of chunks: pictures and texts of up to `CHUNK` rows of the pools from `turn` on."""

    def __init__(self, samples: PooledSamples, turn: int) -> None:
        # Only what a worker process needs: the network stays in the main process.
        self.source, self.order, self.transform = samples.source, samples.order, samples.transform
        self.pools, self.turn = samples.pools, turn

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        mine, workers = (0, 1) if info is None else (info.id, info.num_workers)
        number = 0
        for turn in count(self.turn):
            needed = self.pools.needed(turn)
            for start in range(0, len(needed), CHUNK):
                if number % workers == mine:
                    yield self.read([turn * self.pools.size + k for k in needed[start : start + CHUNK]])
                number += 1

    def read(self, places: Sequence[int]) -> dict[str, Any]:
        broken: list[tuple[str, str]] = []
        rows = [self._row(place, broken) for place in places]
        pairs = [pair for pair, _ in rows]
        return {
            "pixels": torch.from_numpy(np.stack([pixels for _, pixels in rows])),
            "ids": [pair.id for pair in pairs],
            "instructions": [pair.instruction for pair in pairs],
            "captions": [pair.edited_caption for pair in pairs],
            "labels": {
                key: torch.from_numpy(np.stack([pair.labels[key] for pair in pairs]))
                for key in pairs[0].labels
            },
            "broken": broken,
        }

    def _row(self, place: int, broken: list[tuple[str, str]]) -> tuple[Pair, np.ndarray]:
        """The row at a position, or the first usable one after it; adds the rows it skips to `broken`."""
        row = self.order(place)
        for k in range(100):
            try:
                pair = self.source[(row + k) % len(self.source)]
                variant = variant_of(place, self.pools.seed, self.transform, pair.instruction)
                return pair, self.transform.versions(pair, [variant])[0]
            except BrokenRow as error:
                broken.append((error.id, error.reason))
        id, reason = broken[-100]
        raise InputError(
            f"100 consecutive rows of {self.source.name} are broken, the first of them {id} ({reason}); "
            f"check the data: ip2p data check {self.source.name}"
        )


class PooledSamples:
    """Samples from pools: `pool` rows of the order are encoded at once and used `reuse` times.

    encode: maps uint8 pictures [batch, 3, h, w] to the mean and standard deviation of their latents. `reuse`
    1 is plain training without a cache; more pays off for pictures that are drawn and never repeat.
    quarantine: a file for the ids and faults of broken rows.
    """

    def __init__(
        self,
        source: Source,
        read_texts: Reader,
        transform: Transform,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        objective: Objective,
        share: Share,
        *,
        seed: int,
        pool: int,
        reuse: int = 1,
        workers: int = 0,
        kept: Sequence[int] | None = None,
        quarantine: Path | None = None,
    ) -> None:
        self.source, self.read_texts, self.transform, self.encode = source, read_texts, transform, encode
        self.objective, self.workers, self.quarantine = objective, workers, quarantine
        whole = max(1, round(pool / share.batch)) * share.batch  # a whole number of steps
        self.pools = Pools(share, whole, reuse, seed)
        self.order: Callable[[int], int]
        prompts = getattr(source, "prompts", None)
        rows = range(len(source)) if kept is None else kept
        if source.endless:
            self.order = int  # position p is row p
        elif prompts is not None:
            self.order = PromptOrder(rows, [prompts[row] for row in rows], seed)
        else:
            chosen = set(rows)
            blocks = [[row for row in block if row in chosen] for block in source.blocks()]
            self.order = Order(rows, seed, blocks=[block for block in blocks if block])
        self.seen = 0
        self.broken: dict[str, str] = {}

    def __call__(self, first: int) -> Iterator[list[EditBatch]]:
        """Yield the micro-batches of each step from `first` on; a resumed run encodes its pool again."""
        pools = self.pools
        start, step = divmod(first, pools.steps)
        loader = torch.utils.data.DataLoader(
            _Chunks(self, start),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            # Read the next pool while training on the current one.
            prefetch_factor=max(2, -(-pools.size // CHUNK) // self.workers) if self.workers else None,
        )
        chunks = iter(loader)
        for turn in count(start):
            needed, rows = pools.needed(turn), pools.rows(turn)
            pool = self._encoded(chunks, len(needed))
            at = {row: number for number, row in enumerate(needed)}
            base = turn * pools.size * pools.reuse
            for k in range(step, pools.steps):
                yield [
                    self._batch(pool, [at[rows[p]] for p in places], [base + p for p in places])
                    for places in pools.share.places(k)
                ]
            step = 0

    def _encoded(self, chunks: Iterator[dict[str, Any]], missing: int) -> dict[str, Any]:
        """The next `missing` rows of the chunks, with latents instead of pixels."""
        parts: list[dict[str, Any]] = []
        while missing > 0:
            chunk = next(chunks)
            pixels: Tensor = chunk.pop("pixels")
            missing -= len(pixels)
            self._note(chunk.pop("broken"), len(pixels))
            mean, std = self.encode(pixels.transpose(0, 1).flatten(0, 1))
            half = len(pixels)
            chunk |= {"before": mean[:half], "mean": mean[half:], "std": std[half:]}
            if self.objective.change_share:
                differ = (pixels[:, 0] != pixels[:, 1]).any(dim=1, keepdim=True).float()
                chunk["changed"] = F.max_pool2d(differ, differ.shape[-1] // mean.shape[-1]).to(mean.device)
            parts.append(chunk)
        return _joined(parts)

    def _batch(self, pool: dict[str, Any], rows: Sequence[int], places: Sequence[int]) -> EditBatch:
        draws = random_draws(places, self.pools.seed, pool["mean"].shape[1:], self.objective)
        instructions = [pool["instructions"][k] for k in rows]
        captions = [pool["captions"][k] for k in rows]
        texts = self.read_texts(chosen_texts(instructions, captions, draws.text_null, draws.caption_only))
        return EditBatch(
            before=pool["before"][rows],
            mean=pool["mean"][rows],
            std=pool["std"][rows],
            draws=draws,
            ids=[pool["ids"][k] for k in rows],
            changed=pool["changed"][rows] if "changed" in pool else None,
            labels={k: v[rows] for k, v in pool["labels"].items()},
            **texts._asdict(),
        )

    def _note(self, broken: Sequence[tuple[str, str]], seen: int) -> None:
        """Record broken rows. Raises InputError if there are too many."""
        self.seen += seen
        for id, reason in broken:
            if id in self.broken:
                continue
            self.broken[id] = reason
            log.warning("skipping %s: %s", id, reason)
            if self.quarantine is not None:
                append_row(self.quarantine, {"id": id, "reason": reason})
        total = self.seen if self.source.endless else min(self.seen, len(self.source))
        if len(self.broken) > MAX_BROKEN * max(total, 100):
            first = "; ".join(f"{id}: {reason}" for id, reason in list(self.broken.items())[:3])
            raise InputError(
                f"{len(self.broken)} of {self.seen} rows of {self.source.name} are broken, more than "
                f"{MAX_BROKEN:.0%} ({first}); fix or remove them, then run the same command again."
            )


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of tensors, lists, or such columns, joined along the rows."""
    joined: dict[str, Any] = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, dict):
            joined[key] = _joined(values)
        else:
            joined[key] = torch.cat(values) if isinstance(first, Tensor) else list(chain(*values))
    return joined
