"""Estimates the memory that an edit needs, and chooses how to fit it into the free memory of the device.

The estimate is the size of the weights plus the largest activation maps that are alive at once. These are
counted in maps of a network's first width (`python -m benchmarks.speed memory` counts them), for attention
that stores no matrix, times 1.5 for the kernels' workspace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ip2p.base.devices import return_freed_memory
from ip2p.base.errors import InputError, ResourceError
from ip2p.models.keys import CLIP, CLIP_XL, OPENCLIP, OPENCLIP_XL, UNET, VAE, Shape

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle
    from ip2p.models.load import Stored

MemoryMode = Literal["low", "auto", "high"]
MODES = ("low", "auto", "high")
# SD 1.x and 2.x have 26 maps at the peak of a pass, SDXL 16; an autoencoder's decoder 6, its encoder 5.
UNET_MAPS, VAE_MAPS, WORKSPACE = 26, 6, 1.5
# Maps that a ControlNet's residuals add to the UNet's.
CONTROL_MAPS = 8
# Prefixes of the parts in a single file, which may contain more.
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": (CLIP, OPENCLIP, CLIP_XL),
    "text_encoder_2": (OPENCLIP_XL,),
}
# Memory of the libraries themselves: the CUDA context and its kernels, or threads and code.
RESERVE = {"cuda": 600_000_000, "mps": 300_000_000, "cpu": 100_000_000}


@dataclass(frozen=True)
class Memory:
    """How an edit uses memory; the defaults save none.

    passes_at_once: the three passes of a step are one call. vae_tiling: the autoencoder processes pictures
    above its own size in tiles, which changes them slightly. offload: only the part in use is on the device.
    """

    passes_at_once: bool = True
    vae_tiling: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part's weights, and of the largest maps for one latent cell, and for one pixel.

    factor: pixels a latent cell's side; tile: the side from which on the autoencoder can tile; passes: of a
    step, 1 for a distilled model.
    """

    unet: int
    vae: int
    text: int
    control: int
    cell: float
    pixel: float
    factor: int = 8
    tile: int = 512
    passes: int = 3

    @property
    def weights(self) -> int:
        """Bytes of all parts."""
        return self.unet + self.vae + self.text + self.control

    def peak(self, plan: Memory, size: tuple[int, int], batch: int = 1) -> int:
        """Bytes at the fullest moment of an edit of `batch` results at `size`, weights included."""
        pixels = size[0] * size[1]
        rows = batch * (self.passes if plan.passes_at_once else 1)
        sampling = int(self.cell * pixels / self.factor**2 * rows)
        # Decoding goes one picture at a time.
        coding = int(self.pixel * (min(pixels, self.tile**2) if plan.vae_tiling else pixels))
        if plan.offload:
            return max(self.unet + self.control + sampling, self.vae + coding, self.text)
        return self.weights + max(sampling, coding)


def choose_memory(
    footprint: Footprint,
    mode: MemoryMode,
    free: int | None,
    size: tuple[int, int],
    *,
    batch: int = 1,
    device: str = "cpu",
    offload: bool | None = None,
) -> Memory:
    """How to edit at `size` with `free` bytes for everything, weights included; None if unknown.

    `high` never saves memory. `auto` takes the first way that fits. `low` takes the most economical way that
    does not change the result: sequential passes and offloading. Tiling is the last resort. offload: fixes
    that choice, if the parts are already in place. Raises ResourceError, with a size that fits.
    """
    check_memory(mode)
    away = [False] if device == "cpu" else [False, True] if offload is None else [offload]
    ways = [
        Memory(at_once, tiling, off)
        for tiling, off, at_once in itertools.product([False, True], away, [True, False])
    ]
    if mode == "high":
        return ways[0]
    if mode == "low":
        ways = [plan for plan in ways if not plan.passes_at_once and plan.offload == away[-1]]
    if free is None:
        return ways[0]
    room = free - RESERVE.get(device, 0)
    for plan in ways:
        if footprint.peak(plan, size, batch) <= room:
            return plan
    raise ResourceError(_too_large(footprint, ways[-1], max(room, 0), size, batch, device))


def check_memory(mode: str) -> None:
    """Raise InputError for an unknown mode."""
    if mode not in MODES:
        raise InputError(f"Memory mode {mode!r} is not known; use one of {', '.join(MODES)}.")


def _too_large(
    footprint: Footprint, plan: Memory, room: int, size: tuple[int, int], batch: int, device: str
) -> str:
    need = footprint.peak(plan, size, batch)
    line = f"An edit at {size[0]}x{size[1]} needs about {_giga(need)} and {device} has {_giga(room)} free."
    if batch > 1 and footprint.peak(plan, size, 1) <= room:
        return f"{line} Try a batch size of 1."
    longer = max(size)
    for side in range(longer // 64 * 64, 0, -64):
        smaller = tuple(max(64, round(edge * side / longer)) for edge in size)
        if side < longer and footprint.peak(plan, (smaller[0], smaller[1])) <= room:
            return f"{line} Try size {side}."
    way = "another device, or dtype fp16" if device != "cpu" else "a smaller model, or dtype bf16"
    return f"{line} Nothing smaller fits: close other programs, or use {way}."


def _giga(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


# --- what a model needs ------------------------------------------------------------------------


def footprint(bundle: Bundle, controlnet: nn.Module | None = None) -> Footprint:
    """The footprint of a loaded model."""
    unet, vae = bundle.unet, bundle.vae
    texts = [part for part in (bundle.text_encoder, bundle.text_encoder_2) if part is not None]
    return _footprint(
        unet=_bytes([unet]),
        vae=_bytes([vae]),
        text=_bytes(texts),
        control=_bytes([] if controlnet is None else [controlnet]),
        unet_width=unet.config.block_out_channels[0] * unet.dtype.itemsize,
        vae_width=vae.config.block_out_channels[0] * vae.dtype.itemsize,
        factor=bundle.latent_factor,
        tile=vae.tile_sample_min_size,
        passes=_passes(unet.config),
    )


def footprint_of_stored(
    model: Stored, dtype: torch.dtype, controlnet: Mapping[str, Shape] | None = None
) -> Footprint:
    """The footprint that a model on disk will have. controlnet: the shapes of a ControlNet's weights."""
    item = dtype.itemsize
    config = model.configs["vae"]
    upcast = model.kind == "sdxl" and config.get("force_upcast", True)  # as in `load_bundle`
    vae_item = 4 if upcast else item

    def numbers(part: str) -> int:
        if part not in model.weights:
            return 0
        shapes = model.weights[part].shapes
        if model.layout == "file":
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(PREFIXES[part])}
        return _numbers(shapes)

    widths = config.get("block_out_channels", (64,))
    side = config.get("sample_size", 512)
    return _footprint(
        unet=numbers("unet") * item,
        vae=numbers("vae") * vae_item,
        text=(numbers("text_encoder") + numbers("text_encoder_2")) * item,
        control=_numbers(controlnet or {}) * item,
        unet_width=model.configs["unet"].get("block_out_channels", (320,))[0] * item,
        vae_width=widths[0] * vae_item,
        factor=2 ** (len(widths) - 1),
        tile=side if isinstance(side, int) else max(side),
        passes=_passes(model.configs["unet"]),
    )


def _footprint(*, unet_width: int, vae_width: int, control: int, **more: int) -> Footprint:
    maps = UNET_MAPS + (CONTROL_MAPS if control else 0)
    return Footprint(
        control=control, cell=maps * WORKSPACE * unet_width, pixel=VAE_MAPS * WORKSPACE * vae_width, **more
    )


def _passes(unet_config: Mapping[str, Any]) -> int:
    return 1 if unet_config.get("time_cond_proj_dim") else 3


def _numbers(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def bytes_on(groups: Sequence[Sequence[nn.Module]], device: torch.device) -> int:
    """Bytes of the weights that are on a device of this type now."""
    there = [part for group in groups for part in group if next(part.parameters()).device.type == device.type]
    return _bytes(there)


def _bytes(parts: Iterable[nn.Module]) -> int:
    return sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())


# --- what a device has -------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a device; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return free_ram()


def free_ram(root: Path = Path("/")) -> int | None:
    """Available bytes of the machine, limited by the control groups of this process; None if unknown."""
    return_freed_memory()  # otherwise it counts as used
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    if "MemAvailable" not in kilobytes:
        return None
    return min([int(kilobytes["MemAvailable"]) * 1024, *_group_room(root)])


def _group_room(root: Path) -> list[int]:
    # Version 2 has one tree, version 1 one for memory; a container may see its own group as the root.
    names = {"v2": ("memory.max", "memory.current", "inactive_file")}
    names["v1"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    rooms = []
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers not in ("", "memory"):
            continue
        limit, usage, cache = names["v1" if controllers else "v2"]
        top = root / "sys/fs/cgroup" / controllers
        folder = top / path.strip("/")
        for place in [folder, *folder.parents]:
            if place != top and top not in place.parents:
                break
            try:
                most = int((place / limit).read_text())
                used = int((place / usage).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max" is no limit
                continue
            rooms.append(max(0, most - used + int(stat.get(cache, 0))))
    return rooms


# --- moving parts ------------------------------------------------------------------------------


def offload(groups: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
    """Keep all parts in RAM except the group in use, which is moved to `device` when one of it is called."""
    from accelerate.hooks import ModelHook, add_hook_to_module
    from accelerate.utils import send_to_device

    there: list[Sequence[nn.Module]] = []

    class Visit(ModelHook):
        def __init__(self, group: Sequence[nn.Module]) -> None:
            self.group = group

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not there or there[0] is not self.group:
                for part in there.pop() if there else ():
                    part.to("cpu")
                for part in self.group:
                    part.to(device)
                there.append(self.group)
            return send_to_device(args, device), send_to_device(kwargs, device)

    for group in groups:
        for part in group:
            add_hook_to_module(part.to("cpu"), Visit(group))
