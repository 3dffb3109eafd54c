"""What the frozen networks say of the data, computed once: latents of both pictures, and encoded texts.

Both are stored in parts of some hundred rows, memory-mapped when they are read. The `ledger` of the folder
lists the parts, so a build that was killed resumes with those that are missing. Every part is made from its
own rows alone, so any number of processes may share the work; each claims a part by a lock that ends with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from ip2p.data.records import BrokenRow, Source
from ip2p.models.text import Prompt
from ip2p.training.transform import Transform
from ip2p.training.workers import start_worker

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle

QUARANTINE = "quarantine.jsonl"
FORMAT = 1  # goes up when the files change: old caches are then rebuilt
PART_ROWS = 256
CHUNK_BYTES, CHUNK_ROWS = 16 * 2**20, 32  # decoded pixels that travel from a worker at once
BYTES = {"fp16": 2, "fp32": 4}
TENSORS = {"fp16": torch.float16, "fp32": torch.float32}
TEXTS = ("ids", "instructions", "captions", "edited_captions")


class Stopped(Exception):
    """`stop` said so before a cache was whole; what is committed stays."""


# --- keys --------------------------------------------------------------------------------------


def weights_key(module: nn.Module) -> str:
    """A hash of a network's config and weights, 16 hex digits; seconds for the largest, on any device.

    Of each tensor it takes the exact sum of its bits read as whole numbers, which any single change
    changes, and some thousand values in their places, which a change of order changes.
    """
    digest = hashlib.sha256(_text(_config(module)))
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        bits = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        some = bits[:: max(1, bits.numel() // 4096)].cpu().numpy()
        digest.update(_text([name, list(tensor.shape), str(tensor.dtype), int(bits.sum(dtype=torch.int64))]))
        digest.update(some.tobytes())
    return digest.hexdigest()[:16]


def text_key(bundle: Bundle, size: tuple[int, int]) -> str:
    """A hash of all that decides how `bundle` encodes a text for pictures of `size`, 16 hex digits."""
    parts: list[Any] = [bundle.kind, bundle.zero_empty_text, list(size) if bundle.kind == "sdxl" else None]
    for encoder, tokenizer in (
        (bundle.text_encoder, bundle.tokenizer),
        (bundle.text_encoder_2, bundle.tokenizer_2),
    ):
        if encoder is not None and tokenizer is not None:
            rules = getattr(tokenizer, "backend_tokenizer", None)
            said = rules.to_str() if rules is not None else sorted(tokenizer.get_vocab().items())
            parts += [weights_key(encoder), said, tokenizer.model_max_length, str(tokenizer.pad_token)]
    return _hash(parts)


def _config(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None:
        return {}
    known = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # Where it came from and by which version are not what it is.
    return {k: v for k, v in known.items() if not k.startswith("_") and k != "transformers_version"}


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _hash(value: object) -> str:
    return hashlib.sha256(_text(value)).hexdigest()[:16]


# --- parts in a folder -------------------------------------------------------------------------


class Parts:
    """A folder of `count` files that several processes fill together.

    done: the manifest's line of each committed part. Claims only save work: if two processes made one part,
    both would write the same bytes.
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
        """Missing parts that no process has claimed, each claimed now; those of this rank come first."""
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
        """Write a claimed part, then its line, and release the claim. An error leaves nothing half-written.

        Raises ResourceError for a full disk, OSError for one that fails.
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

    def fill(
        self,
        make: Callable[[Iterator[int]], None],
        *,
        rank: int,
        world: int,
        say: Say,
        stop: Callable[[], bool],
    ) -> None:
        """Have `make` commit the parts that it claims, until all are there, whichever process made them."""
        waited = False
        while len(self.done) < self.count:
            if stop():
                raise Stopped(f"{len(self.done)} of {self.count} parts of {self.folder} are made")
            claims = self.claims(rank, world)
            first = next(claims, None)
            if first is not None:
                make(chain([first], claims))
                continue
            if not waited:
                say(f"the last parts of {self.folder} are another process's; waiting for it")
                waited = True
            # A lock could be waited for, but then neither `stop` nor a signal's flag would be seen.
            time.sleep(0.1)
            self.ledger.refresh()

    def need(self, numbers_a_part: int, dtype: str, what: str) -> None:
        """Raise ResourceError if the parts that are missing will not fit on the disk."""
        need = (self.count - len(self.done)) * numbers_a_part * BYTES[dtype]
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ResourceError(
                f"{what} take {need / 1e9:.1f} GB more in {self.folder}, where {free / 1e9:.1f} GB are free. "
                "Free some, or put the cache on another disk."
            )


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
    """Mean (which is the mode) and standard deviation of the posteriors, unscaled, fp32, on the VAE's device.

    pixels: uint8 [batch, 3, height, width] on any device. autocast: a number format to compute in, such as
    bf16 where it is fast; None keeps the VAE's own.
    """
    levels = pixels.to(vae.device, non_blocking=True).float()
    # The order of operations is `images.to_tensor`'s: to the last bit, so are the latents.
    pictures = (2 * (levels / 255) - 1).to(vae.dtype, memory_format=torch.channels_last)
    with torch.autocast(vae.device.type, dtype=autocast, enabled=autocast is not None):
        posterior = vae.encode(pictures).latent_dist
    return posterior.mode().float(), posterior.std.float()


class LatentCache:
    """Memory-mapped latents of both pictures of each row and variant, as `build_cache` left them.

    rows: which of the source's rows they are, in its order. ids, instructions, captions, edited_captions:
    of each. labels: class numbers by name, int64 [rows, …], where the data have them. broken: id and reason
    of the rows left out. A copy that travels to another process opens the files anew there.
    """

    def __init__(self, folder: Path, say: Say = terminal.say) -> None:
        """Open a whole cache. Raises InputError for one that is not whole."""
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.dtype: str = meta["dtype"]
        self.shape = tuple(meta["shape"])  # variants, 3 (before, mean, std), channels, h, w
        with Parts(folder, meta["parts"], ".latents") as parts:
            parts.ledger.drop_lost(say)
            if missing := parts.count - len(parts.done):
                raise InputError(f"{missing} of {parts.count} parts of {folder} are missing; build it again.")
            lines = [parts.done[part] for part in range(parts.count)]
            self._paths = [parts.path(part) for part in range(parts.count)]
        self._kept = [line["rows"] for line in lines]
        self._starts = np.cumsum([0, *self._kept[:-1]])
        self.broken: list[tuple[str, str]] = [(id, reason) for line in lines for id, reason in line["broken"]]
        self.rows: list[int] = []
        self.ids: list[str] = []
        self.instructions: list[str] = []
        self.captions: list[str] = []
        self.edited_captions: list[str] = []
        labels: dict[str, list[Any]] = {}
        number = math.prod(self.shape) * BYTES[self.dtype]
        for path, kept in zip(self._paths, self._kept, strict=True):
            with open(path, "rb") as file:
                file.seek(kept * number)
                texts = json.loads(file.read())
            self.rows += texts["rows"]
            for name in TEXTS:
                getattr(self, name).extend(texts[name])
            for name, values in texts["labels"].items():
                labels.setdefault(name, []).extend(values)
        self.labels = {name: np.asarray(values, np.int64) for name, values in labels.items()}
        self._maps: dict[int, np.ndarray] = {}

    @property
    def variants(self) -> int:
        return int(self.shape[0])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row: its texts. Rows without captions have only their ids to differ by."""
        rows = zip(self.ids, self.captions, self.instructions, self.edited_captions, strict=True)
        return [
            "\x1f".join((caption, instruction, edited)) if caption and edited else id
            for id, caption, instruction, edited in rows
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, places: Sequence[int], variants: Sequence[int]) -> Latents:
        """The latents of some rows, each in one variant; a place is an index into `rows`."""
        where, which = np.asarray(places, np.int64), np.asarray(variants, np.int64)
        if len(where) and not (where.min() >= 0 and where.max() < len(self)):
            raise IndexError(f"places are from 0 to {len(self) - 1}, and not {where.min()} to {where.max()}")
        part = np.searchsorted(self._starts, where, side="right") - 1
        found = np.empty((len(where), *self.shape[1:]), self.dtype.replace("fp", "float"))
        for number in np.unique(part):
            here = np.flatnonzero(part == number)
            found[here] = self._map(int(number))[where[here] - self._starts[number], which[here]]
        return Latents(*(some.float().contiguous() for some in torch.from_numpy(found).unbind(1)))

    def _map(self, part: int) -> np.ndarray:
        if part not in self._maps:
            numbers = self._kept[part] * math.prod(self.shape)
            self._maps[part] = _mapped(self._paths[part], numbers, self.dtype).reshape(-1, *self.shape)
        return self._maps[part]


def _mapped(path: Path, numbers: int, dtype: str) -> np.ndarray:
    # Unlike numpy's, torch's maps keep no file open: a thousand parts would be a thousand handles.
    return torch.from_file(str(path), False, numbers, dtype=TENSORS[dtype]).numpy()


@dataclass
class _Chunk:
    """Rows of one part, decoded: pixels uint8 [rows, variants, 2, 3, height, width]."""

    part: int
    last: bool
    pixels: np.ndarray
    rows: list[int] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in TEXTS})
    labels: dict[str, list[Any]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)


class _Decoder(Dataset):
    """Reads and transforms the rows of a chunk, in whichever process asks for it."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, chunk: tuple[int, range, bool]) -> _Chunk:
        part, rows, last = chunk
        made = _Chunk(part, last, np.empty(0, np.uint8))
        pixels = []
        for row in rows:
            try:
                pair = self.source[row]
                pixels.append(self.transform.versions(pair))
            except BrokenRow as error:
                made.broken.append((error.id, error.reason))
                continue
            made.rows.append(row)
            texts = (pair.id, pair.instruction, pair.caption, pair.edited_caption)
            for name, text in zip(TEXTS, texts, strict=True):
                made.texts[name].append(text)
            for name, values in pair.labels.items():
                made.labels.setdefault(name, []).append(np.asarray(values).tolist())
        if pixels:
            made.pixels = np.stack(pixels)
        return made


class _Chunks(Sampler):
    """The chunks of the parts that are claimed, each part when its turn comes."""

    def __init__(self, parts: Iterator[int], rows: int, total: int) -> None:
        self.parts, self.rows, self.total = parts, rows, total

    def __iter__(self) -> Iterator[tuple[int, range, bool]]:
        for part in self.parts:
            rows = range(part * PART_ROWS, min(self.total, (part + 1) * PART_ROWS))
            for first in range(0, len(rows), self.rows):
                yield part, rows[first : first + self.rows], first + self.rows >= len(rows)


def _same(chunk: Any) -> Any:
    return chunk


def build_cache(
    source: Source,
    bundle: Bundle,
    transform: Transform,
    folder: Path,
    *,
    batch: int = 8,
    dtype: Literal["fp16", "fp32"] = "fp16",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_broken: float = 0.01,
    say: Say = terminal.say,
    stop: Callable[[], bool] = lambda: False,
) -> LatentCache:
    """Encode both pictures of every row in every variant once; the cache is a folder inside `folder`.

    Its name is a hash of the VAE, the data, the transform and the number formats: with the same ones, what is
    there is taken, and the call goes on with what is missing. Any number of processes and jobs may call at
    once; each returns when all is there. batch: pictures in a pass of the VAE. dtype: of the files. device:
    where the VAE works during the build, its own if None. autocast: see `encode_pictures`. workers: processes
    that decode pictures ahead of the VAE. rank, world: which of how many processes of one job this is.

    Broken rows are listed in `quarantine.jsonl`; where they are more than the share `max_broken` of all,
    InputError names the first ones. Raises ResourceError for a disk that is too small, OSError for one that
    fails, ModelError for a VAE that gives no numbers, Stopped when `stop()` is true.
    """
    total = len(source)
    if source.endless or not total:
        what = "is drawn without end" if source.endless else "has no rows"
        raise InputError(f"{source.name} {what}, so its latents cannot be cached. Name data with rows.")
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
        parts.need(min(total, PART_ROWS) * math.prod(shape), dtype, f"The latents of {total} pairs")
        row_bytes = transform.variants * 6 * transform.size[0] * transform.size[1]
        # Enough rows to fill a pass, but no more than travel well.
        chunk = max(math.ceil(batch / (2 * transform.variants)), min(CHUNK_ROWS, CHUNK_BYTES // row_bytes), 1)

        def make(claims: Iterator[int]) -> None:
            loader = DataLoader(
                _Decoder(source, transform),
                batch_size=None,
                sampler=_Chunks(claims, chunk, total),
                num_workers=workers,
                collate_fn=_same,
                worker_init_fn=start_worker,
            )
            chunks: list[_Chunk] = []
            encoded: list[Tensor] = []
            for decoded in loader:
                if stop():
                    raise Stopped(f"{len(parts.done)} of {parts.count} parts of {home} are made")
                if decoded.rows:
                    # They stay on the device until the part is whole, so that nothing waits for them.
                    encoded.append(_encoded(vae, decoded.pixels, batch, autocast, TENSORS[dtype]))
                decoded.pixels = np.empty(0, np.uint8)
                chunks.append(decoded)
                if decoded.last:
                    _commit(parts, chunks, encoded)
                    chunks, encoded = [], []
                    _check_broken(parts, source, max_broken)
                    step()

        before = vae.device
        vae.to(before if device is None else device, memory_format=torch.channels_last)
        try:
            _check_broken(parts, source, max_broken)
            with terminal.progress("latents", parts.count - len(parts.done)) as step:
                parts.fill(make, rank=rank, world=world, say=say, stop=stop)
            _check_broken(parts, source, max_broken)
        finally:
            vae.to(before, memory_format=torch.contiguous_format)
    return LatentCache(home, say)


def _encoded(
    vae: Any, pixels: np.ndarray, batch: int, autocast: torch.dtype | None, number: torch.dtype
) -> Tensor:
    """[rows, variants, 3, channels, h, w] of decoded pixels: before, and mean and deviation of after."""
    rows, variants = pixels.shape[:2]
    flat = torch.from_numpy(pixels).flatten(0, 2)
    moments = [encode_pictures(vae, some, autocast=autocast) for some in flat.split(batch)]
    mean, std = (torch.cat(some).unflatten(0, (rows, variants, 2)) for some in zip(*moments, strict=True))
    return torch.stack([mean[:, :, 0], mean[:, :, 1], std[:, :, 1]], dim=2).to(number)


def _commit(parts: Parts, chunks: Sequence[_Chunk], encoded: Sequence[Tensor]) -> None:
    rows = [row for chunk in chunks for row in chunk.rows]
    texts: dict[str, Any] = {"rows": rows, "labels": {}}
    for name in TEXTS:
        texts[name] = [text for chunk in chunks for text in chunk.texts[name]]
    for chunk in chunks:
        for name, values in chunk.labels.items():
            texts["labels"].setdefault(name, []).extend(values)
    numbers = torch.cat(list(encoded)).cpu().numpy() if encoded else np.empty(0, np.float32)
    if not np.isfinite(numbers).all():
        wrong = int(np.flatnonzero(~np.isfinite(numbers).reshape(len(rows), -1).all(axis=1))[0])
        raise ModelError(
            f"The autoencoder gives no numbers (NaN or too large) for the pictures of {texts['ids'][wrong]}. "
            "Load it in fp32 and keep its latents in fp32, or name another with --vae."
        )
    broken = [pair for chunk in chunks for pair in chunk.broken]
    text = json.dumps(texts, ensure_ascii=False).encode()
    parts.commit(chunks[0].part, [numbers.reshape(-1), text], {"rows": len(rows), "broken": broken})


def _check_broken(parts: Parts, source: Source, most: float) -> None:
    """Write the list of broken rows. Raises InputError if there are too many."""
    broken = [pair for part in sorted(parts.done) for pair in parts.done[part]["broken"]]
    if not broken:
        return
    path = parts.folder / QUARANTINE
    lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in broken]
    write_text(path, "".join(lines))
    total = len(source)
    if len(broken) > most * total:
        named = "; ".join(f"{id}: {reason.rstrip('.')}" for id, reason in broken[:3])
        raise InputError(
            f"{len(broken)} of {total} rows of {source.name} are broken and {100 * most:g}% may be: {named}. "
            f"All are in {path}; mend them, or see: ip2p data check {source.name}"
        )


# --- texts -------------------------------------------------------------------------------------


class TextCache:
    """Memory-mapped encodings of texts, each text encoded once.

    texts: the different ones, sorted. index: the place of each.
    """

    def __init__(self, texts: Sequence[str], parts: Parts, dtype: str) -> None:
        self.texts = list(texts)
        self.index = {text: place for place, text in enumerate(self.texts)}
        self.folder, self.dtype = parts.folder, dtype
        line = parts.done[0]
        self.hidden, self.pooled = tuple(line["hidden"]), line["pooled"]
        self.time_ids = None if line["time_ids"] is None else torch.tensor(line["time_ids"])
        self._paths = [parts.path(part) for part in range(parts.count)]
        self._maps: dict[int, np.ndarray] = {}

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
        stop: Callable[[], bool] = lambda: False,
    ) -> TextCache:
        """Encode the different ones among `texts`, `batch` at a time, into a folder inside `folder`.

        encode: a row of a Prompt for each text; time_ids, if any, are the same for all. key: of what
        decides it (`text_key`). The rest is as in `build_cache`.
        """
        different = sorted(set(texts))
        if not different:
            raise InputError("There are no texts to encode. Name data with instructions.")
        count = math.ceil(len(different) / PART_ROWS)
        home = folder / _hash([FORMAT, PART_ROWS, key, dtype, different])
        with Parts(home, count, ".texts") as parts:
            parts.ledger.drop_lost(say)

            def make(claims: Iterator[int]) -> None:
                for part in claims:
                    some = different[part * PART_ROWS : (part + 1) * PART_ROWS]
                    prompts = []
                    for first in range(0, len(some), batch):
                        if stop():
                            raise Stopped(f"{len(parts.done)} of {parts.count} parts of {home} are made")
                        with torch.no_grad():
                            prompts.append(encode(some[first : first + batch]))
                    numbers, line = _flat(prompts, TENSORS[dtype])
                    assert len(numbers) == len(some), "encode gives a row a text"
                    parts.need(
                        numbers[:1].numel() * min(PART_ROWS, len(different)), dtype, "The encoded texts"
                    )
                    parts.commit(part, [numbers.numpy().reshape(-1)], line)
                    step()

            with terminal.progress("texts", parts.count - len(parts.done)) as step:
                parts.fill(make, rank=rank, world=world, say=say, stop=stop)
            return cls(different, parts, dtype)

    def __len__(self) -> int:
        return len(self.texts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def places(self, texts: Iterable[str]) -> list[int]:
        """The index of each text. Raises KeyError for one that was not encoded."""
        return [self.index[text] for text in texts]

    def read(self, indices: Sequence[int]) -> Prompt:
        """The encoded texts of some places, fp32 on the CPU."""
        where = np.asarray(indices, np.int64)
        split = math.prod(self.hidden)
        found = np.empty((len(where), split + self.pooled), self.dtype.replace("fp", "float"))
        part = where // PART_ROWS
        for number in np.unique(part):
            here = np.flatnonzero(part == number)
            found[here] = self._map(int(number))[where[here] - number * PART_ROWS]
        rows = torch.from_numpy(found).float()
        hidden = rows[:, :split].reshape(-1, *self.hidden)
        if not self.pooled:
            return Prompt(hidden)
        times = None if self.time_ids is None else self.time_ids.repeat(len(where), 1)
        return Prompt(hidden, rows[:, split:].contiguous(), times)

    def _map(self, part: int) -> np.ndarray:
        if part not in self._maps:
            rows = min(PART_ROWS, len(self) - part * PART_ROWS)
            width = math.prod(self.hidden) + self.pooled
            self._maps[part] = _mapped(self._paths[part], rows * width, self.dtype).reshape(rows, width)
        return self._maps[part]


def _flat(prompts: Sequence[Prompt], number: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Encoded texts as rows of numbers, and how to read them."""
    hidden = torch.cat([prompt.hidden for prompt in prompts])
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    times = [prompt.time_ids for prompt in prompts if prompt.time_ids is not None]
    line = {
        "hidden": list(hidden.shape[1:]),
        "pooled": pooled[0].shape[1] if pooled else 0,
        "time_ids": times[0][0].tolist() if times else None,
    }
    rows = torch.cat([hidden.flatten(1), *([torch.cat(pooled)] if pooled else [])], dim=1)
    return rows.to(number).cpu(), line
