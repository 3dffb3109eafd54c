"""Seconds of an edit: ip2p beside diffusers' InstructPix2Pix pipeline, the same random weights, in turn.

    python -m benchmarks.speed                    # SD 1.5's size, 512 px, 4 steps, 1 and 4 pictures
    python -m benchmarks.speed --size small       # a quarter of each width, 256 px: a quick run
    python -m benchmarks.speed --size storybook   # the bundled model with the settings of its card
    python -m benchmarks.speed --only ip2p diffusers --count 1

Each contestant is loaded in a process of its own, which waits until it is called. In each round all of them
make the same edit, one after the other, in an order that turns round every time; a ratio is the median of the
ratios within rounds, so that a machine that slows down falls on all alike. "from start" is the time from the
start of a process to its first edit. "ip2p distilled" has the network that `ip2p distill` makes, which needs
one pass a step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import machine_name, table, write_model

# Each width of SD 1.5 divided by this; pixels.
SIZES = {"full": (1, 512), "small": (4, 256), "tiny": (20, 64)}
Edit = Callable[[int], Any]  # makes so many results


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The work, the same for each contestant."""

    folder: Path  # of the models
    pixels: int
    steps: int
    text_cfg: float
    image_cfg: float
    device: str
    dtype: str
    threads: int | None

    @property
    def picture(self) -> Any:
        from PIL import Image

        return Image.linear_gradient("L").resize((self.pixels, self.pixels)).convert("RGB")


def write_setup(folder: Path, args: argparse.Namespace) -> tuple[Setup, int]:
    """Write the editor into `folder`; returns the work and the number of the UNet's parameters."""
    how = {"folder": folder, "device": args.device, "dtype": args.dtype, "threads": args.threads}
    if args.size == "storybook":
        from ip2p.models.bundle import load_bundle

        bundle = load_bundle("storybook")
        shutil.copytree(bundle.folder, folder / "editor")
        card = bundle.card
        work = {"steps": args.steps or card.steps, "text_cfg": card.text_cfg, "image_cfg": card.image_cfg}
        return Setup(pixels=card.native_size, **work, **how), bundle.unet.num_parameters()
    part, pixels = SIZES[args.size]
    layers = {"layers": 1, "blocks": 2, "text_layers": 1} if args.size == "tiny" else {}
    counts = write_model(folder / "editor", part=part, size=pixels, in_channels=8, dtype=args.dtype, **layers)
    return Setup(pixels=pixels, steps=args.steps or 4, text_cfg=7.5, image_cfg=1.5, **how), counts["unet"]


def write_distilled(model: Path, folder: Path) -> None:
    """Write the editor `model` again with the guidance scales as an input of its network."""
    import torch
    from diffusers import UNet2DConditionModel

    from ip2p.models.widen import add_scales_input

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("unet"))
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.bfloat16)
    add_scales_input(unet)
    unet.save_pretrained(folder / "unet")
    card = folder / "ip2p.json"
    known = json.loads(card.read_text()) if card.exists() else {}
    ranges = {"text_cfg_range": [1, 12], "image_cfg_range": [1, 2.5]}
    card.write_text(json.dumps(known | ranges))


def open_ip2p(setup: Setup, *, model: str = "editor", **how: Any) -> Edit:
    from ip2p.editing.editor import Editor

    editor = Editor.load(setup.folder / model, device=setup.device, dtype=setup.dtype, **how)
    return lambda count: editor.edit(
        setup.picture,
        "make it night",
        seeds=range(count),
        steps=setup.steps,
        size=setup.pixels,
        text_cfg=setup.text_cfg,
        image_cfg=setup.image_cfg,
    )


def open_diffusers(setup: Setup, *, channels_last: bool = False, compiled: bool = False) -> Edit:
    import torch
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    from ip2p.base.devices import DTYPE_ALIASES, DTYPES

    dtype = DTYPES[DTYPE_ALIASES[setup.dtype]]
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        setup.folder / "editor", torch_dtype=dtype
    )
    if pipeline.scheduler.config.prediction_type != "sample":  # not supported by that sampler of diffusers
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.to(setup.device).set_progress_bar_config(disable=True)
    if channels_last:
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
    return lambda count: (
        pipeline(
            "make it night",
            image=setup.picture,
            num_inference_steps=setup.steps,
            num_images_per_prompt=count,
            guidance_scale=setup.text_cfg,
            image_guidance_scale=setup.image_cfg,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images
    )


# The first is what the others are compared with.
CONTESTANTS: dict[str, Callable[[Setup], Edit]] = {
    "diffusers channels-last": lambda setup: open_diffusers(setup, channels_last=True),
    "diffusers": open_diffusers,
    "ip2p": open_ip2p,
    "ip2p compiled": lambda setup: open_ip2p(setup, compile=True),
    "ip2p distilled": lambda setup: open_ip2p(setup, model="distilled"),
    "diffusers compiled": lambda setup: open_diffusers(setup, channels_last=True, compiled=True),
}


def serve_edits(name: str, setup: Setup, calls: Connection) -> None:
    """In a process of its own: load, edit once, then once for each number that comes; answer with times."""
    import torch

    if setup.threads:
        torch.set_num_threads(setup.threads)
    try:
        edit = CONTESTANTS[name](setup)
        count = 1
        while count:
            wall, cpu = time.perf_counter(), time.process_time()
            edit(count)  # results are pictures, so a GPU has finished
            calls.send((time.perf_counter() - wall, time.process_time() - cpu))
            count = calls.recv()
    except Exception as error:
        calls.send(f"{type(error).__name__}: {error}")


@dataclass
class Contestant:
    """A loaded contestant; raises SystemExit when it fails."""

    name: str
    setup: Setup
    from_start: float = 0.0
    wall: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.calls, theirs = spawn.Pipe()
        begun = time.perf_counter()
        self.process = spawn.Process(target=serve_edits, args=(self.name, self.setup, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._times()
        self.from_start = time.perf_counter() - begun

    def _times(self) -> tuple[float, float]:
        try:
            answer = self.calls.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: the process ended; is there enough memory?") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.name}: {answer}")
        wall, cpu = answer
        return float(wall), float(cpu)

    def edit(self, count: int, *, note: bool) -> None:
        self.calls.send(count)
        wall, cpu = self._times()
        if note:
            self.wall.setdefault(count, []).append(wall)
            self.cpu.setdefault(count, []).append(cpu)

    def close(self) -> None:
        self.calls.send(0)
        self.process.join()


def open_contestants(names: list[str], setup: Setup) -> list[Contestant]:
    """Those that can be loaded here; compilation needs a compiler, for one. Raises SystemExit for none."""
    opened = []
    for name in names:
        try:
            opened.append(Contestant(name, setup))
        except SystemExit as error:
            print(f"left out: {error}", file=sys.stderr)
    if not opened:
        raise SystemExit("none of the contestants could be loaded")
    return opened


def run_rounds(contestants: list[Contestant], counts: list[int], rounds: int) -> None:
    for count in counts:
        for number in range(rounds + 1):
            order = contestants if number % 2 else contestants[::-1]
            for each in order:
                each.edit(count, note=number > 0)  # the first round of a batch size warms up
            print(f"{count} at once: round {number} of {rounds}", file=sys.stderr, flush=True)


def compare_pairs(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest ratio of times that were taken in the same rounds."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def results_table(contestants: list[Contestant], counts: list[int]) -> str:
    base = contestants[0]
    heads = ["", "from start"]
    for count in counts:
        heads += [f"{count} at once: s", "CPU s", f"× {base.name}"]
    rows = []
    for each in contestants:
        row: list[object] = [each.name, f"{each.from_start:.1f} s"]
        for count in counts:
            wall, cpu = (statistics.median(times[count]) for times in (each.wall, each.cpu))
            ratio, low, high = compare_pairs(each.wall[count], base.wall[count])
            row += [f"{wall:.3g}", f"{cpu:.3g}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(row)
    return table(heads, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=[*SIZES, "storybook"], default="full")
    parser.add_argument("--count", type=int, nargs="+", default=[1, 4], help="pictures at once")
    parser.add_argument("--steps", type=int, help="default: 4, or those of the bundled model's card")
    parser.add_argument("--rounds", type=int, default=3, help="timed edits of each contestant")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="write every time here")


def run(args: argparse.Namespace) -> int:
    import diffusers
    import torch

    import ip2p

    names = [name for name in CONTESTANTS if name in args.only]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        setup, parameters = write_setup(Path(folder), args)
        if "ip2p distilled" in names:
            write_distilled(setup.folder / "editor", setup.folder / "distilled")
        contestants = open_contestants(names, setup)
        run_rounds(contestants, args.count, args.rounds)
        for each in contestants:
            each.close()
    head = (
        f"{machine_name(args.device)}; {args.dtype}, {setup.pixels} px, {setup.steps} steps, UNet of "
        f"{parameters / 1e6:.0f} M parameters, {args.rounds} rounds; torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, ip2p {ip2p.__version__}"
    )
    print(f"{head}\n\n{results_table(contestants, args.count)}")
    if args.json:
        found = {each.name: {"from_start": each.from_start, "wall": each.wall} for each in contestants}
        args.json.write_text(json.dumps({"settings": head, "times": found}, indent=2) + "\n")
    return 0
