"""Outputs of the frozen networks, computed once: latents of both pictures of each row, and encoded texts.

Both are stored in parts of a few hundred rows, which are memory-mapped for reading. The folder's `ledger`
lists the parts, so a killed build resumes with the missing ones. A part depends on its own rows alone, so any
number of processes can share the work; each claims a part with a lock that its death releases.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ip2p.base import terminal
from ip2p.base.errors import InputError, ModelError, ResourceError
from ip2p.base.files import make_folder, remove_temporaries, write_text
from ip2p.base.ledger import LOCK, Files, Ledger, Line, Lock, Say
from ip2p.data.records import BrokenRow, Pair, Source
from ip2p.models.text import Prompt
from ip2p.training.transform import Transform
from ip2p.training.workers import start_worker

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle

QUARANTINE = "quarantine.jsonl"
FORMAT = 1  # increases when the files change; older caches are then rebuilt
PART_ROWS = 256
CHUNK_BYTES, CHUNK_ROWS = 16 * 2**20, 32  # maximum size of what a worker sends at once
BYTES = {"fp16": 2, "fp32": 4}
TENSORS = {"fp16": torch.float16, "fp32": torch.float32}
TEXTS = ("ids", "instructions", "captions", "edited_captions")


# --- keys --------------------------------------------------------------------------------------


def weights_key(module: nn.Module) -> str:
    """A hash of a network's config and weights, 16 hex digits; takes seconds for the largest networks.

    It covers, for each tensor, the exact sum of its bits as integers, which any single change alters, and
    some thousand values in order, which a permutation alters.
    """
    digest = hashlib.sha256(_text(_config(module)))
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        bits = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        sample = bits[:: max(1, bits.numel() // 4096)].cpu().numpy()
        digest.update(_text([name, list(tensor.shape), str(tensor.dtype), int(bits.sum(dtype=torch.int64))]))
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def text_key(bundle: Bundle, size: tuple[int, int]) -> str:
    """A hash of everything that affects how `bundle` encodes texts for pictures of `size`, 16 hex digits."""
    parts: list[Any] = [bundle.kind, bundle.zero_empty_text, list(size) if bundle.kind == "sdxl" else None]
    for encoder, tokenizer in (
        (bundle.text_encoder, bundle.tokenizer),
        (bundle.text_encoder_2, bundle.tokenizer_2),
    ):
        if encoder is not None and tokenizer is not None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
            parts += [weights_key(encoder), rules, tokenizer.model_max_length, str(tokenizer.pad_token)]
    return _hash(parts)


def _config(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None:
        return {}
    known = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # The name of its folder and the library's version do not change the network.
    return {k: v for k, v in known.items() if not k.startswith("_") and k != "transformers_version"}


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _hash(value: object) -> str:
    return hashlib.sha256(_text(value)).hexdigest()[:16]


# --- parts in a folder -------------------------------------------------------------------------


class Parts:
    """A folder of `count` files that several processes fill together.

    done: the manifest's line of each committed part. Claims only avoid duplicate work: two processes that
    made the same part would write the same bytes.
    """

    def __init__(self, folder: Path, count: int, suffix: str) -> None:
        make_folder(folder)
        self.folder, self.count, self.suffix = folder, count, suffix
        self.ledger = Ledger(folder, shared=True, files_of=self._files_of)
        self.done = self.ledger.done
        self._claims: dict[int, Lock] = {}

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        for part in list(self._claims):
            self._release(part)

    def path(self, part: int) -> Path:
        return self.folder / f"{part:06}{self.suffix}"

    def _files_of(self, line: Line) -> Files:
        return {self.path(line["part"]).name: (line["bytes"], line["sha256"])}

    def claims(self, rank: int, world: int) -> Iterator[int]:
        """Claim and yield missing parts that no other process has claimed, those of this rank first."""
        for part in sorted(range(self.count), key=lambda k: ((k - rank) % world, k)):
            if part not in self.done and part not in self._claims and self._claim(part):
                yield part

    def _claim(self, part: int) -> bool:
        lock = Lock(self.folder / f"{LOCK}-{part:06}")
        if not lock.acquire():
            return False
        self._claims[part] = lock
        remove_temporaries(self.folder, f"{part:06}")
        self.ledger.refresh()  # another process may have committed it just before
        if part in self.done:
            self._release(part)
            return False
        return True

    def _release(self, part: int) -> None:
        self._claims.pop(part).release()

    def commit(self, part: int, blocks: Sequence[Any], line: Mapping[str, Any]) -> None:
        """Write a claimed part, then its line, and release the claim. An error leaves no partial file.

        Raises ResourceError if the disk is full, and OSError for other disk errors.
        """
        path, files = self.path(part), Files()
        try:
            with self.ledger.write(path.name, files) as temporary, open(temporary, "wb") as file:
                for block in blocks:
                    file.write(memoryview(block).cast("B") if len(block) else b"")
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        size, sha256 = files[path.name]
        self.ledger.append({"part": part, "bytes": size, "sha256": sha256, **line})
        self._release(part)

    def fill(self, make: Callable[[Iterator[int]], None], *, rank: int, world: int, say: Say) -> None:
        """Call `make` with claimed parts, which it must commit, until this and other processes made all."""
        waited = False
        while len(self.done) < self.count:
            claims = self.claims(rank, world)
            first = next(claims, None)
            if first is not None:
                make(chain([first], claims))
                continue
            if not waited:
                say(f"waiting for another process that is making the last parts of {self.folder}")
                waited = True
            time.sleep(0.1)  # unlike waiting for the lock, this can be interrupted
            self.ledger.refresh()

    def check_space(self, numbers_a_part: int, dtype: str, what: str) -> None:
        """Raise ResourceError if the missing parts will not fit on the disk."""
        need = (self.count - len(self.done)) * numbers_a_part * BYTES[dtype]
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ResourceError(
                f"{what} need {need / 1e9:.1f} GB more in {self.folder}, which has {free / 1e9:.1f} GB free. "
                "Free some space, or use --cache to choose a folder on another disk."
            )


class PartRows:
    """The rows of arrays that are stored in several files, memory-mapped on first use in each process.

    counts: rows of each file. shape: of a row. dtype: fp16 or fp32.
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], shape: Sequence[int], dtype: str
    ) -> None:
        self.paths, self.counts, self.shape, self.dtype = paths, counts, tuple(shape), dtype
        self.starts = np.cumsum([0, *counts[:-1]])
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, places: Sequence[int], *inner: Sequence[int]) -> Tensor:
        """Some rows in fp32, [places, …]. inner: indices into the first dimensions of each row."""
        where, *inside = (np.asarray(index, np.int64) for index in (places, *inner))
        part = np.searchsorted(self.starts, where, side="right") - 1
        found = np.empty((len(where), *self.shape[len(inner) :]), self.dtype.replace("fp", "float"))
        for number in np.unique(part):
            here = np.flatnonzero(part == number)
            index = (where[here] - self.starts[number], *(some[here] for some in inside))
            found[here] = self._map(int(number))[index]
        return torch.from_numpy(found).float()

    def _map(self, part: int) -> np.ndarray:
        if part not in self._maps:
            numbers = self.counts[part] * math.prod(self.shape)
            # Unlike numpy's, torch's maps keep no file open; a thousand parts would be a thousand handles.
            mapped = torch.from_file(str(self.paths[part]), False, numbers, dtype=TENSORS[self.dtype])
            self._maps[part] = mapped.numpy().reshape(-1, *self.shape)
        return self._maps[part]


# --- latents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Unscaled latents of a batch, fp32 on the CPU, [batch, channels, h, w] each.

    before: the mode of the input picture's posterior. mean, std: of the edited picture's posterior.
    """

    before: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode_pictures(
    vae: Any, pixels: Tensor, *, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Mean (also the mode) and standard deviation of the posteriors, unscaled, fp32, on the VAE's device.

    pixels: uint8 [batch, 3, height, width] on any device. autocast: the dtype to compute in, such as bf16;
    None uses the VAE's.
    """
    levels = pixels.to(vae.device, non_blocking=True).float()
    # The same order of operations as in `images.to_tensor`, for bit-exact latents.
    pictures = (2 * (levels / 255) - 1).to(vae.dtype, memory_format=torch.channels_last)
    with torch.autocast(vae.device.type, dtype=autocast, enabled=autocast is not None):
        posterior = vae.encode(pictures).latent_dist
    return posterior.mode().float(), posterior.std.float()


class LatentCache:
    """The latents of both pictures of each row and variant, as written by `build_cache`.

    rows: the source's rows that the cache has, ascending. ids, instructions, captions, edited_captions: of
    each. labels: class numbers by name, int64 [rows, …], if the data have them. broken: id and reason of each
    row that was skipped. Can be pickled; the copy opens the files again.
    """

    def __init__(self, folder: Path, say: Say = terminal.say) -> None:
        """Open a complete cache. Raises InputError for an incomplete one."""
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with Parts(folder, meta["parts"], ".latents") as parts:
            parts.ledger.drop_lost(say)
            if missing := parts.count - len(parts.done):
                raise InputError(f"{missing} of {parts.count} parts of {folder} are missing; build it again.")
            lines = [parts.done[part] for part in range(parts.count)]
            paths = [parts.path(part) for part in range(parts.count)]
        # Of a row: variants, 3 (before, mean, std), channels, h, w.
        self._latents = PartRows(paths, [line["rows"] for line in lines], meta["shape"], meta["dtype"])
        self.broken: list[tuple[str, str]] = [(id, reason) for line in lines for id, reason in line["broken"]]
        self.rows: list[int] = []
        self.ids: list[str] = []
        self.instructions: list[str] = []
        self.captions: list[str] = []
        self.edited_captions: list[str] = []
        labels: dict[str, list[Any]] = {}
        for path, line in zip(paths, lines, strict=True):
            with open(path, "rb") as file:
                file.seek(line["rows"] * math.prod(meta["shape"]) * BYTES[meta["dtype"]])
                texts = json.loads(file.read())
            for name in ("rows", *TEXTS):
                getattr(self, name).extend(texts[name])
            for name, values in texts["labels"].items():
                labels.setdefault(name, []).extend(values)
        self.labels = {name: np.asarray(values, np.int64) for name, values in labels.items()}

    @property
    def variants(self) -> int:
        return self._latents.shape[0]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[str]:
        """Each row's prompt: its texts, or its id if it has no captions."""
        rows = zip(self.ids, self.captions, self.instructions, self.edited_captions, strict=True)
        return [
            "\x1f".join((caption, instruction, edited)) if caption and edited else id
            for id, caption, instruction, edited in rows
        ]

    def read(self, places: Sequence[int], variants: Sequence[int]) -> Latents:
        """The latents of some rows, each in one variant; a place is an index into `rows`."""
        if len(places) and not (min(places) >= 0 and max(places) < len(self)):
            raise IndexError(f"places are 0 to {len(self) - 1}, but got {min(places)} to {max(places)}")
        return Latents(*(some.contiguous() for some in self._latents.read(places, variants).unbind(1)))


@dataclass
class _Chunk:
    """Some rows of one part, decoded.

    pairs: without their pictures. pixels: uint8 [rows, variants, 2, 3, height, width]. last: of the part.
    """

    part: int
    last: bool
    rows: list[int] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    pixels: np.ndarray | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Decoder(Dataset):
    """Reads and transforms the rows of a chunk, in the process that asks for it."""

    source: Source
    transform: Transform

    def __getitem__(self, index: tuple[int, range, bool]) -> _Chunk:
        part, rows, last = index
        chunk, pixels = _Chunk(part, last), []
        for row in rows:
            try:
                pair = self.source[row]
                pixels.append(self.transform.versions(pair))
            except BrokenRow as error:
                chunk.broken.append((error.id, error.reason))
                continue
            chunk.rows.append(row)
            chunk.pairs.append(replace(pair, before=b"", after=b"", mask=None))
        if pixels:
            chunk.pixels = np.stack(pixels)
        return chunk


@dataclass
class _Chunks(Sampler):
    """The chunks of claimed parts: part, up to `size` of its rows, and whether they are the last ones."""

    parts: Iterator[int]
    size: int
    total: int

    def __iter__(self) -> Iterator[tuple[int, range, bool]]:
        for part in self.parts:
            rows = range(part * PART_ROWS, min(self.total, (part + 1) * PART_ROWS))
            for first in range(0, len(rows), self.size):
                yield part, rows[first : first + self.size], first + self.size >= len(rows)


def build_cache(
    source: Source,
    bundle: Bundle,
    transform: Transform,
    folder: Path,
    *,
    batch: int = 8,
    dtype: Literal["fp16", "fp32"] = "fp16",
    autocast: torch.dtype | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_broken: float = 0.01,
    say: Say = terminal.say,
) -> LatentCache:
    """Encode both pictures of every row in every variant, once. The cache is a folder inside `folder`.

    Its name is a hash of the VAE, the data, the transform and the dtypes; a call with the same ones continues
    with the missing parts. Any number of processes and jobs may call at the same time; each returns when the
    cache is complete. batch: pictures per pass of the VAE. dtype: of the files. autocast: as in
    `encode_pictures`. workers: processes that decode pictures ahead. rank, world: number of this process in
    its job, and number of processes of the job.

    Broken rows are listed in `quarantine.jsonl`. Raises InputError that names the first ones if they are more
    than the share `max_broken`, ResourceError if the disk is too small, OSError for other disk errors, and
    ModelError if the VAE returns nonfinite numbers.
    """
    total = len(source)
    if source.endless or not total:
        what = "is endless" if source.endless else "has no rows"
        raise InputError(f"{source.name} {what}, so its latents cannot be cached. Use a finite data set.")
    vae: Any = bundle.vae
    cells = [side // bundle.latent_factor for side in transform.size[::-1]]
    shape = [transform.variants, 3, int(vae.config.latent_channels), *cells]
    meta: dict[str, Any] = {
        "format": FORMAT,
        "vae": weights_key(vae),
        "data": source.key,
        "transform": asdict(transform),
        "dtype": dtype,
        "autocast": str(autocast),
        "total": total,
        "part_rows": PART_ROWS,
        "shape": shape,
        "parts": math.ceil(total / PART_ROWS),
    }
    home = folder / _hash(meta)
    with Parts(home, meta["parts"], ".latents") as parts:
        if not (home / "meta.json").exists():
            write_text(home / "meta.json", json.dumps(meta | {"name": source.name}, indent=1) + "\n")
        parts.ledger.drop_lost(say)
        parts.check_space(min(total, PART_ROWS) * math.prod(shape), dtype, f"the latents of {total} pairs")
        row_bytes = transform.variants * 6 * transform.size[0] * transform.size[1]
        # Enough rows for a pass, but not too much to send between processes.
        size = max(math.ceil(batch / (2 * transform.variants)), min(CHUNK_ROWS, CHUNK_BYTES // row_bytes), 1)

        def make(claims: Iterator[int]) -> None:
            loader = DataLoader(
                _Decoder(source, transform),
                batch_size=None,
                sampler=_Chunks(claims, size, total),
                num_workers=workers,
                worker_init_fn=start_worker,
            )
            chunks: list[_Chunk] = []
            encoded: list[Tensor] = []
            for chunk in loader:
                if chunk.pixels is not None:
                    # Kept on the device until the part is complete, so that the loop does not wait for it.
                    encoded.append(_encode(vae, chunk.pixels, batch, autocast).to(TENSORS[dtype]))
                    chunk.pixels = None
                chunks.append(chunk)
                if chunk.last:
                    _commit(parts, chunks, encoded)
                    chunks, encoded = [], []
                    _check_broken(parts, source, max_broken)
                    advance()

        vae.to(memory_format=torch.channels_last)
        try:
            _check_broken(parts, source, max_broken)
            with terminal.progress("latents", parts.count - len(parts.done)) as advance:
                parts.fill(make, rank=rank, world=world, say=say)
            _check_broken(parts, source, max_broken)
        finally:
            vae.to(memory_format=torch.contiguous_format)
    return LatentCache(home, say)


def _encode(vae: Any, pixels: np.ndarray, batch: int, autocast: torch.dtype | None) -> Tensor:
    """Decoded pixels to [rows, variants, 3, channels, h, w]: before, and mean and deviation of after."""
    flat = torch.from_numpy(pixels).flatten(0, 2)
    moments = [encode_pictures(vae, some, autocast=autocast) for some in flat.split(batch)]
    mean, std = (torch.cat(some).unflatten(0, pixels.shape[:3]) for some in zip(*moments, strict=True))
    return torch.stack([mean[:, :, 0], mean[:, :, 1], std[:, :, 1]], dim=2)


def _commit(parts: Parts, chunks: Sequence[_Chunk], encoded: Sequence[Tensor]) -> None:
    rows = [row for chunk in chunks for row in chunk.rows]
    pairs = [pair for chunk in chunks for pair in chunk.pairs]
    numbers = torch.cat(list(encoded)).cpu().numpy() if encoded else np.empty(0, np.float32)
    if not np.isfinite(numbers).all():
        wrong = int(np.flatnonzero(~np.isfinite(numbers).reshape(len(rows), -1).all(axis=1))[0])
        raise ModelError(
            f"the autoencoder returns nonfinite latents for the pictures of {pairs[wrong].id}. "
            "Use cache_dtype: fp32 in a recipe, or another autoencoder with --vae."
        )
    texts = {
        "rows": rows,
        "labels": {name: [np.asarray(p.labels[name]).tolist() for p in pairs] for name in pairs[0].labels}
        if pairs
        else {},
        "ids": [pair.id for pair in pairs],
        "instructions": [pair.instruction for pair in pairs],
        "captions": [pair.caption for pair in pairs],
        "edited_captions": [pair.edited_caption for pair in pairs],
    }
    broken = [row for chunk in chunks for row in chunk.broken]
    text = json.dumps(texts, ensure_ascii=False).encode()
    parts.commit(chunks[0].part, [numbers.reshape(-1), text], {"rows": len(rows), "broken": broken})


def _check_broken(parts: Parts, source: Source, most: float) -> None:
    """Write the list of broken rows. Raises InputError if there are too many."""
    broken = [row for part in sorted(parts.done) for row in parts.done[part]["broken"]]
    if not broken:
        return
    path = parts.folder / QUARANTINE
    lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in broken]
    write_text(path, "".join(lines))
    total = len(source)
    if len(broken) > most * total:
        first = "; ".join(f"{id}: {reason.rstrip('.')}" for id, reason in broken[:3])
        raise InputError(
            f"{len(broken)} of {total} rows of {source.name} are broken, more than {100 * most:g}%: {first}. "
            f"All are listed in {path}; fix or remove them, or see: ip2p data check {source.name}"
        )


# --- texts -------------------------------------------------------------------------------------


class TextCache:
    """Encoded texts, each text once. Can be pickled; the copy opens the files again.

    texts: without duplicates, sorted. index: the place of each.
    """

    def __init__(self, texts: Sequence[str], parts: Parts, dtype: str) -> None:
        self.texts = list(texts)
        self.index = {text: place for place, text in enumerate(self.texts)}
        self.folder = parts.folder
        line = parts.done[0]
        self.hidden, self.pooled = tuple(line["hidden"]), line["pooled"]
        self.time_ids = None if line["time_ids"] is None else torch.tensor(line["time_ids"])
        counts = [min(PART_ROWS, len(self) - part * PART_ROWS) for part in range(parts.count)]
        width = math.prod(self.hidden) + self.pooled
        self._rows = PartRows([parts.path(part) for part in range(parts.count)], counts, (width,), dtype)

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        encode: Callable[[list[str]], Prompt],
        folder: Path,
        *,
        key: str,
        batch: int = 32,
        dtype: Literal["fp16", "fp32"] = "fp16",
        rank: int = 0,
        world: int = 1,
        say: Say = terminal.say,
    ) -> TextCache:
        """Encode the distinct texts, `batch` at a time, into a folder inside `folder`.

        encode: returns a Prompt with a row per text; time_ids, if any, are the same for all. key: of what
        affects the encoding (`text_key`). The rest is as in `build_cache`.
        """
        distinct = sorted(set(texts))
        if not distinct:
            raise InputError("there are no texts to encode; use data with instructions.")
        count = math.ceil(len(distinct) / PART_ROWS)
        home = folder / _hash([FORMAT, PART_ROWS, key, dtype, distinct])
        with Parts(home, count, ".texts") as parts:
            parts.ledger.drop_lost(say)

            def make(claims: Iterator[int]) -> None:
                for part in claims:
                    some = distinct[part * PART_ROWS : (part + 1) * PART_ROWS]
                    with torch.no_grad():
                        prompts = [encode(some[k : k + batch]) for k in range(0, len(some), batch)]
                    rows, line = _flat(prompts)
                    assert len(rows) == len(some), "encode returns a row per text"
                    parts.check_space(
                        rows.shape[1] * min(PART_ROWS, len(distinct)), dtype, "the encoded texts"
                    )
                    parts.commit(part, [rows.to(TENSORS[dtype]).cpu().numpy().reshape(-1)], line)
                    advance()

            with terminal.progress("texts", parts.count - len(parts.done)) as advance:
                parts.fill(make, rank=rank, world=world, say=say)
            return cls(distinct, parts, dtype)

    def __len__(self) -> int:
        return len(self.texts)

    def places(self, texts: Iterable[str]) -> list[int]:
        """The index of each text. Raises KeyError for a text that was not encoded."""
        return [self.index[text] for text in texts]

    def read(self, places: Sequence[int]) -> Prompt:
        """The encoded texts at some places, fp32 on the CPU."""
        rows = self._rows.read(places)
        hidden, pooled = rows.split([math.prod(self.hidden), self.pooled], dim=1)
        hidden = hidden.reshape(-1, *self.hidden)
        if not self.pooled:
            return Prompt(hidden)
        times = None if self.time_ids is None else self.time_ids.repeat(len(rows), 1)
        return Prompt(hidden, pooled.contiguous(), times)


def _flat(prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Any]]:
    """Encoded texts as rows of numbers, and their layout."""
    hidden = torch.cat([prompt.hidden for prompt in prompts])
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    times = prompts[0].time_ids
    line = {
        "hidden": list(hidden.shape[1:]),
        "pooled": pooled[0].shape[1] if pooled else 0,
        "time_ids": None if times is None else times[0].tolist(),
    }
    return torch.cat([hidden.flatten(1), *([torch.cat(pooled)] if pooled else [])], dim=1), line
