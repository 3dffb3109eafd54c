"""Where a step's samples come from: the latent cache, or pictures that are encoded as training goes.

A run's samples stand in one endless row. Place p of it is one row of the data, in one variant, with one draw
of all that is random; which, follows from p and the run's seed. Step k takes the places from k · batch on. So
the order, the noise and the dropout are the same however a batch is split over processes and micro-batches,
and a run that goes on needs nothing but the number of its step.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.base.files import append_row
from ip2p.data.records import BrokenRow, Pair, Source
from ip2p.training.objective import EditBatch, Objective, draw, place_seed
from ip2p.training.transform import Transform
from ip2p.training.workers import start_worker

if TYPE_CHECKING:
    from ip2p.training.cache import LatentCache, TextCache

log = logging.getLogger("ip2p")

MAX_BROKEN = 0.01
QUARANTINE = "quarantine.jsonl"
# Mirrored pictures would make these words wrong.
_SIDED = re.compile(r"\b(left|right|clockwise|counterclockwise)\b", re.IGNORECASE)


class Order:
    """Which of `count` rows stands at a place: every epoch has each row once, in an order of its own.

    blocks: rows that are cheap to read together; then blocks are shuffled, and rows among `window` of them.
    endless: place p is row p, for a source that never repeats itself.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        blocks: Sequence[Sequence[int]] | None = None,
        endless: bool = False,
        window: int = 16,
    ) -> None:
        if count < 1:
            raise InputError("there is no row left to train on; look at the data: ip2p data check PATH")
        self.count, self.seed, self.blocks, self.endless, self.window = count, seed, blocks, endless, window
        self._epoch: tuple[int, Any] = (-1, None)

    def __call__(self, place: int) -> int:
        if self.endless:
            return place
        epoch, position = divmod(place, self.count)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return int(self._epoch[1][position])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(place_seed("epoch", self.seed, epoch))
        if self.blocks is None or len(self.blocks) < 2:
            return rng.permutation(self.count)
        order = rng.permutation(len(self.blocks))
        parts = []
        for first in range(0, len(order), self.window):
            near = np.concatenate([np.asarray(self.blocks[k]) for k in order[first : first + self.window]])
            parts.append(rng.permutation(near))
        return np.concatenate(parts)


class PromptOrder:
    """Which of `rows` stands at a place: every epoch has each prompt once, and one of its pairs at random.

    So a prompt with four pairs weighs as much as one with one, as in the released training.
    """

    def __init__(self, rows: Sequence[int], prompts: Sequence[str], seed: int) -> None:
        groups: dict[str, list[int]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            groups.setdefault(prompt, []).append(row)
        self.groups, self.seed = list(groups.values()), seed
        self.order = Order(len(self.groups), seed)

    def __call__(self, place: int) -> int:
        group = self.groups[self.order(place)]
        return group[place_seed("pair", self.seed, place) % len(group)]


class Words(NamedTuple):
    """A text as `EditBatch` has it."""

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


Reader = Callable[[list[str]], Words]


def read_tokens(tokenizer: Any) -> Reader:
    """Texts as the tokens of an encoder that learns along."""

    def read(texts: list[str]) -> Words:
        limit = tokenizer.model_max_length
        told = tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return Words(told.input_ids)

    return read


def read_cached(cache: TextCache) -> Reader:
    """Texts as the hidden states of an encoder that does not."""

    def read(texts: list[str]) -> Words:
        prompt = cache.read(cache.places(texts))
        return Words(prompt.hidden, prompt.pooled, prompt.time_ids)

    return read


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each step this process makes: `batch` samples in all, `micro` of them at once here."""

    batch: int
    micro: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.micro * self.world):
            raise InputError(
                f"a batch of {self.batch} cannot be split into micro-batches of {self.micro} on {self.world} "
                f"processes; give a --batch that is a multiple of {self.micro * self.world}."
            )

    def places(self, step: int) -> list[range]:
        """The places of this process's micro-batches."""
        turn = self.micro * self.world
        starts = range(step * self.batch + self.rank * self.micro, (step + 1) * self.batch, turn)
        return [range(start, start + self.micro) for start in starts]


def variant_of(place: int, seed: int, transform: Transform, instruction: str) -> int:
    """The variant that stands at a place; an instruction that names a side is not mirrored."""
    variant = place_seed("variant", seed, place) % transform.variants
    return variant & ~1 if transform.flip and _SIDED.search(instruction) else variant


def chosen_texts(
    instructions: Sequence[str], captions: Sequence[str], text_null: Tensor, alone: Tensor
) -> list[str]:
    """The text of each sample after the dropout: the instruction, nothing, or the edited caption alone."""
    rows = zip(instructions, captions, text_null.tolist(), alone.tolist(), strict=True)
    return [caption if only else "" if null else instruction for instruction, caption, null, only in rows]


# --- from the cache ---


class CachedSamples:
    """Samples whose latents lie on the disk.

    kept: the places in the cache that are trained on. ahead: read in a thread while the device works.
    """

    def __init__(
        self,
        cache: LatentCache,
        words: Reader,
        transform: Transform,
        objective: Objective,
        share: Share,
        *,
        seed: int,
        kept: Sequence[int],
        ahead: bool = True,
    ) -> None:
        self.ahead = ahead
        self.cache, self.words, self.transform, self.objective = cache, words, transform, objective
        self.share, self.seed = share, seed
        prompts = cache.prompts  # rebuilt at each access
        self.order = PromptOrder(kept, [prompts[place] for place in kept], seed)
        self.shape = cache.read([kept[0]], [0]).before.shape[1:]

    def batch(self, places: Sequence[int]) -> EditBatch:
        rows = [self.order(place) for place in places]
        told = [self.cache.instructions[row] for row in rows]
        variants = [
            variant_of(place, self.seed, self.transform, text)
            for place, text in zip(places, told, strict=True)
        ]
        draws = draw(places, self.seed, self.shape, self.objective)
        latents = self.cache.read(rows, variants)
        captions = [self.cache.edited_captions[row] for row in rows]
        words = self.words(chosen_texts(told, captions, draws.text_null, draws.caption_only))
        return EditBatch(
            before=latents.before,
            mean=latents.mean,
            std=latents.std,
            draws=draws,
            ids=[self.cache.ids[row] for row in rows],
            **words._asdict(),
        )

    def __call__(self, first: int) -> Iterator[list[EditBatch]]:
        """The micro-batches of each step from `first` on, read ahead by a thread if the device is another."""

        def steps() -> Iterator[list[EditBatch]]:
            step = first
            while True:
                yield [self.batch(places) for places in self.share.places(step)]
                step += 1

        # On a CPU a second thread's small sums would take the cores from the network's.
        return ahead(steps()) if self.ahead else steps()


def ahead(items: Iterator[Any], count: int = 3) -> Iterator[Any]:
    """The items, up to `count` of them made beforehand in a thread; its error is raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(count)
    ended = threading.Event()

    def put(row: tuple[bool, Any]) -> bool:
        while not ended.is_set():
            try:
                ready.put(row, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
        except BaseException as error:
            put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            good, item = ready.get()
            if not good:
                raise item
            yield item
    finally:
        ended.set()


# --- encoded as training goes ---


class _Chunks(torch.utils.data.IterableDataset):
    """Pictures and words of the pools from `turn` on, some dozens of rows at a time, an endless stream."""

    def __init__(self, samples: PooledSamples, turn: int) -> None:
        # Only what a worker process needs: the network stays where it is.
        self.source, self.order, self.transform = samples.source, samples.order, samples.transform
        self.pool, self.seed, self.needed, self.turn = samples.pool, samples.seed, samples.needed, turn

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        mine, workers = (0, 1) if info is None else (info.id, info.num_workers)
        turn, number = self.turn, 0
        while True:
            needed = self.needed(turn)
            for start in range(0, len(needed), CHUNK):
                if number % workers == mine:
                    yield self.make([turn * self.pool + k for k in needed[start : start + CHUNK]])
                number += 1
            turn += 1

    def make(self, places: Sequence[int]) -> dict[str, Any]:
        pairs: list[Pair] = []
        pixels, broken = [], []
        for place in places:
            pair, made, bad = self._row(place)
            pairs.append(pair)
            pixels.append(made)
            broken += bad
        labels = {
            key: torch.from_numpy(np.stack([pair.labels[key] for pair in pairs])) for key in pairs[0].labels
        }
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "ids": [pair.id for pair in pairs],
            "instructions": [pair.instruction for pair in pairs],
            "captions": [pair.edited_caption for pair in pairs],
            "labels": labels,
            "broken": broken,
        }

    def _row(self, place: int) -> tuple[Pair, np.ndarray, list[tuple[str, str]]]:
        """The row at a place, or the next whole one after it."""
        broken: list[tuple[str, str]] = []
        row = self.order(place)
        for k in range(100):
            try:
                pair = self.source[(row + k) % len(self.source)]
                variant = variant_of(place, self.seed, self.transform, pair.instruction)
                return pair, self.transform.versions(pair, [variant])[0], broken
            except BrokenRow as error:
                broken.append((error.id, error.reason))
        raise InputError(
            f"a hundred rows one after the other of {self.source.name} are broken, {broken[0][0]} first "
            f"({broken[0][1]}); look at it: ip2p data check {self.source.name}"
        )


CHUNK = 64


class PooledSamples:
    """Samples that are read, encoded, and used `reuse` times, `pool` rows of the order at a time.

    encode: uint8 pictures [batch, 3, h, w] to the mean and standard deviation of their latents. With
    `reuse` 1 this is plain training without a cache; a drawn world that never ends pays for more.
    quarantine: a file for the ids and faults of broken rows.
    """

    def __init__(
        self,
        source: Source,
        words: Reader,
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
        self.source, self.words, self.transform, self.encode = source, words, transform, encode
        self.objective, self.share, self.seed = objective, share, seed
        # Whole steps make up a pool.
        self.pool = max(1, round(pool / share.batch)) * share.batch
        self.reuse, self.workers, self.quarantine = reuse, workers, quarantine
        self.order: Callable[[int], int]
        if source.endless:
            self.order = Order(1, seed, endless=True)
        else:
            rows = range(len(source)) if kept is None else kept
            prompts = getattr(source, "prompts", None)
            if prompts is not None:
                self.order = PromptOrder(rows, [prompts[row] for row in rows], seed)
            else:
                self.order = _Kept(Order(len(rows), seed, blocks=_blocks(source, rows)), rows)
        self.seen, self.broken = 0, {}  # type: ignore[var-annotated]

    @property
    def steps_a_pool(self) -> int:
        return self.pool * self.reuse // self.share.batch

    def rows_of(self, turn: int) -> list[int]:
        """Which of the pool's rows each of its samples is, over all processes."""
        if self.reuse == 1:
            return list(range(self.pool))
        generator = torch.Generator().manual_seed(place_seed("pool", self.seed, turn))
        shuffled = [torch.randperm(self.pool, generator=generator) for _ in range(self.reuse)]
        return torch.cat(shuffled).tolist()

    def needed(self, turn: int) -> list[int]:
        """The rows of the pool that this process's samples are."""
        if self.share.world == 1:
            return list(range(self.pool))
        rows = self.rows_of(turn)
        steps = range(self.steps_a_pool)
        mine = {rows[place] for step in steps for places in self.share.places(step) for place in places}
        return sorted(mine)

    def __call__(self, first: int) -> Iterator[list[EditBatch]]:
        """The micro-batches of each step from `first` on; a run that goes on encodes its pool anew."""
        turn, step = divmod(first, self.steps_a_pool)
        loader = torch.utils.data.DataLoader(
            _Chunks(self, turn),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            # While one pool is learnt from, the next is read.
            prefetch_factor=max(2, -(-self.pool // CHUNK) // self.workers) if self.workers else None,
        )
        chunks = iter(loader)
        while True:
            pool = self._encoded(chunks, self.needed(turn))
            rows = self.rows_of(turn)
            base = turn * self.pool * self.reuse
            for k in range(step, self.steps_a_pool):
                places = self.share.places(k)
                yield [
                    self._batch(pool, [rows[p] for p in some], [base + p for p in some]) for some in places
                ]
            turn, step = turn + 1, 0

    def _encoded(self, chunks: Iterator[dict[str, Any]], needed: Sequence[int]) -> dict[str, Any]:
        """A pool: its latents, words and labels; `at` finds a row of it."""
        parts: dict[str, list[Any]] = {}
        labels: dict[str, list[Tensor]] = {}
        count = 0
        while count < len(needed):
            chunk = next(chunks)
            pixels = chunk["pixels"]
            count += len(pixels)
            self._note(chunk["broken"], len(pixels))
            both = pixels.transpose(0, 1).reshape(-1, *pixels.shape[2:])
            mean, std = self.encode(both)
            half = len(pixels)
            made = {"before": mean[:half], "mean": mean[half:], "std": std[half:]}
            if self.objective.change_share:
                differ = (pixels[:, 0] != pixels[:, 1]).any(dim=1, keepdim=True).float()
                made["changed"] = F.max_pool2d(differ, differ.shape[-1] // mean.shape[-1]).to(mean.device)
            for key, value in made.items():
                parts.setdefault(key, []).append(value)
            for key, value in chunk["labels"].items():
                labels.setdefault(key, []).append(value)
            for key in ("ids", "instructions", "captions"):
                parts.setdefault(key, []).extend(chunk[key])
        pool: dict[str, Any] = {k: torch.cat(v) if isinstance(v[0], Tensor) else v for k, v in parts.items()}
        pool["labels"] = {k: torch.cat(v) for k, v in labels.items()}
        pool["at"] = {row: number for number, row in enumerate(needed)}
        return pool

    def _batch(self, pool: dict[str, Any], rows: Sequence[int], places: Sequence[int]) -> EditBatch:
        at = [pool["at"][row] for row in rows]
        draws = draw(places, self.seed, pool["mean"].shape[1:], self.objective)
        told = [pool["instructions"][k] for k in at]
        captions = [pool["captions"][k] for k in at]
        words = self.words(chosen_texts(told, captions, draws.text_null, draws.caption_only))
        return EditBatch(
            before=pool["before"][at],
            mean=pool["mean"][at],
            std=pool["std"][at],
            draws=draws,
            ids=[pool["ids"][k] for k in at],
            changed=pool["changed"][at] if "changed" in pool else None,
            labels={k: v[at] for k, v in pool["labels"].items()},
            **words._asdict(),
        )

    def _note(self, broken: Sequence[tuple[str, str]], seen: int) -> None:
        self.seen += seen
        for id, reason in broken:
            if id in self.broken:
                continue
            self.broken[id] = reason
            log.warning("%s is left out: %s", id, reason)
            if self.quarantine is not None:
                append_row(self.quarantine, {"id": id, "reason": reason})
        whole = self.seen if self.source.endless else min(self.seen, len(self.source))
        if len(self.broken) > MAX_BROKEN * max(whole, 100):
            first = "; ".join(f"{id}: {reason}" for id, reason in list(self.broken.items())[:3])
            raise InputError(
                f"{len(self.broken)} of {self.seen} rows of {self.source.name} are broken, more than "
                f"{MAX_BROKEN:.0%} ({first}); mend or remove them, then run the same command again."
            )


class _Kept:
    """An order over some of a source's rows."""

    def __init__(self, order: Order, rows: Sequence[int]) -> None:
        self.order, self.rows = order, rows

    def __call__(self, place: int) -> int:
        return self.rows[self.order(place)]


def _blocks(source: Source, rows: Sequence[int]) -> list[list[int]] | None:
    """The source's blocks as places in `rows`; None when all rows are one block."""
    blocks = source.blocks()
    if len(blocks) < 2:
        return None
    place = {row: number for number, row in enumerate(rows)}
    told = [[place[row] for row in block if row in place] for block in blocks]
    return [block for block in told if block]
