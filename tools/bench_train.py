"""Images a second of `ip2p train` beside those of diffusers' own InstructPix2Pix training script.

    python tools/bench_train.py --script train_instruct_pix2pix.py          # here, a small model
    python tools/bench_train.py --script train_instruct_pix2pix.py --gpu    # one GPU, SD 1.5's size

The script is examples/instruct_pix2pix/train_instruct_pix2pix.py of diffusers' repository: get it there, it
is not part of this package. It needs `pip install datasets`; where torchvision is missing, the five
transforms that it uses are stood in for, with the same torch operations.

Both train the same random model (a UNet of 4 channels, which both widen to 8) on the same storybook pairs,
with AdamW, a moving average, clipping, dropout of the conditions and flips, at the same batch, size,
precision and number of threads. The model has SD 1.5's blocks with each width a quarter of its own
(`--gpu`: whole), so that UNet, autoencoder and text encoder share the work as they do there. Each runs in
its own process, in turn, `--rounds` times; a time is taken after each optimizer step in the same way, and
the first `--skip` steps are left out. CPU seconds (of all threads) are told beside the rates, since they
hardly change where other work shares the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

CONTESTANTS = ("ip2p", "ip2p --no-cache", "diffusers")


# --- the model and the pairs --------------------------------------------------------------------


def write_model(
    folder: Path, *, part: int = 4, blocks: int = 4, layers: int = 2, text_layers: int = 12, size: int = 256
) -> dict[str, int]:
    """Write a random Stable Diffusion of SD 1.5's blocks, each width divided by `part`; returns parameters.

    The tokenizer is the storybook's (its words are the pairs'), with SD's 77 tokens. `blocks` 2 leaves
    the inner two levels of both networks out, for checks that need no likeness.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ip2p.models.bundle import find_model

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(find_model("storybook") / "tokenizer", model_max_length=77)
    width = 64 * max(1, 12 // part)
    unet_widths = [side // part for side in (320, 640, 1280, 1280)][:blocks]
    vae_widths = [side // part for side in (128, 256, 512, 512)][:blocks]
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=text_layers,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            **marks,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=size // 2 ** (blocks - 1),
        in_channels=4,
        block_out_channels=unet_widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * (blocks - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (blocks - 1)),
        layers_per_block=layers,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=math.gcd(32, *unet_widths),
    )
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=math.gcd(32, *vae_widths),
        sample_size=size,
        scaling_factor=0.18215,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def write_pairs(folder: Path, *, count: int, size: int) -> Path:
    """Write storybook pairs as a parquet table that both can read; returns the folder."""
    from ip2p.cli.main import main

    folder.mkdir(parents=True)
    words = ["storybook", "draw", "--count", str(count), "--size", str(size)]
    if code := main([*words, "--pairs", str(folder / "train.parquet")]):
        raise SystemExit(code)
    return folder


# --- a contestant, in a process of its own ------------------------------------------------------


def record_steps(path: Path, cuda: bool) -> None:
    """From now on, append the wall and CPU time after each optimizer step of this process to `path`."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def note(*_: object) -> None:
        if cuda:
            torch.cuda.synchronize()
        with open(path, "a") as file:
            file.write(json.dumps({"wall": time.perf_counter(), "cpu": time.process_time()}) + "\n")

    note()  # the start
    register_optimizer_step_post_hook(note)


def stand_in_for_torchvision() -> None:
    """Put the transforms that diffusers' script uses in torchvision's place, when that is missing."""
    try:
        import torchvision  # noqa: F401

        return
    except ImportError:
        pass
    # These look for torchvision when they are imported, and must not find this.
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from torch import Tensor

    class Crop:
        def __init__(self, side: int) -> None:
            self.side = side

        def __call__(self, x: Tensor) -> Tensor:
            high, wide = x.shape[-2] - self.side, x.shape[-1] - self.side
            y0, x0 = self.corner(high, wide)
            return x[..., y0 : y0 + self.side, x0 : x0 + self.side]

        def corner(self, high: int, wide: int) -> tuple[int, int]:
            return int(torch.randint(0, high + 1, ())), int(torch.randint(0, wide + 1, ()))

    class CenterCrop(Crop):
        def corner(self, high: int, wide: int) -> tuple[int, int]:
            return high // 2, wide // 2

    def flip(x: Tensor) -> Tensor:
        return x.flip(-1) if torch.rand(1) < 0.5 else x

    def compose(steps: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        return run

    transforms = types.ModuleType("torchvision.transforms")
    transforms.Compose, transforms.RandomCrop, transforms.CenterCrop = compose, Crop, CenterCrop  # type: ignore[attr-defined]
    transforms.RandomHorizontalFlip, transforms.Lambda = lambda: flip, lambda f: f  # type: ignore[attr-defined]
    package = types.ModuleType("torchvision")
    package.transforms = transforms  # type: ignore[attr-defined]
    for module in (package, transforms):
        module.__spec__ = ModuleSpec(module.__name__, loader=None)
        sys.modules[module.__name__] = module


def run_child(times: Path, device: str, threads: int, words: list[str]) -> None:
    """Run a script (a path) or a module's command line with the times of its steps recorded."""
    import torch

    torch.set_num_threads(threads)
    program, *sys.argv = [words[0], *words]
    if program != "ip2p":
        stand_in_for_torchvision()
        import accelerate

        # Their trackers would need a package more, and write; neither is wanted in the time of a step.
        accelerate.Accelerator.log = lambda *_, **__: None  # type: ignore[method-assign]
        accelerate.Accelerator.init_trackers = lambda *_, **__: None  # type: ignore[method-assign]
        original = accelerate.Accelerator.__init__
        accelerate.Accelerator.__init__ = lambda self, *a, log_with=None, **k: original(self, *a, **k)  # type: ignore[method-assign]
    record_steps(times, device == "cuda")
    if program == "ip2p":
        runpy.run_module("ip2p", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


# --- the comparison -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Given:
    """What both do alike."""

    script: Path
    model: Path
    data: Path
    batch: int
    size: int
    steps: int
    skip: int
    threads: int
    precision: str
    workers: int
    device: str
    compile: bool


def words_of(who: str, given: Given, folder: Path) -> list[str]:
    """The contestant's command line."""
    if who == "diffusers":
        return [
            str(given.script),
            *("--pretrained_model_name_or_path", str(given.model), "--dataset_name", str(given.data)),
            *("--original_image_column", "original_image", "--edit_prompt_column", "edit_prompt"),
            *("--edited_image_column", "edited_image", "--output_dir", str(folder / "out")),
            *("--cache_dir", str(folder.parent / "datasets"), "--resolution", str(given.size)),
            *("--train_batch_size", str(given.batch), "--max_train_steps", str(given.steps)),
            *("--mixed_precision", {"fp32": "no"}.get(given.precision, given.precision)),
            *("--dataloader_num_workers", str(given.workers), "--checkpointing_steps", "1000000"),
            *("--conditioning_dropout_prob", "0.05", "--lr_warmup_steps", "0", "--seed", "0"),
            *("--random_flip", "--use_ema"),
        ]
    return [
        *("ip2p", "train", "--data", str(given.data), "--base", str(given.model)),
        *("--output", str(folder / "out"), "--size", str(given.size), "--steps", str(given.steps)),
        *("--batch", str(given.batch), "--micro-batch", str(given.batch), "--precision", given.precision),
        *("--workers", str(given.workers), "--device", given.device, "--save-every", "1000000"),
        *("--validate-every", "0", "--track", "none", "--seed", "0"),
        # A pool of one batch is encoded for each step, as diffusers does.
        *(["--no-cache", "--pool", str(given.batch)] if "--no-cache" in who else []),
        *([] if "--no-cache" in who else ["--cache", str(folder / "cache")]),
        *(["--compile"] if given.compile else []),
    ]


def measure(who: str, given: Given, folder: Path) -> dict[str, float]:
    """Run one contestant once: images a second, CPU seconds an image, seconds before the first step."""
    folder.mkdir(parents=True)
    times = folder / "times.jsonl"
    child = [sys.executable, __file__, "--child", str(times), given.device, str(given.threads)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(given.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if given.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(folder / "output.txt", "w") as output:
        done = subprocess.run(
            [*child, *words_of(who, given, folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    if done.returncode:
        tail = (folder / "output.txt").read_text()[-2000:]
        raise SystemExit(f"{who} ended with {done.returncode}:\n{tail}")
    marks = [json.loads(line) for line in times.read_text().splitlines()]
    if len(marks) != given.steps + 1:
        raise SystemExit(
            f"{who} made {len(marks) - 1} optimizer steps, not {given.steps}; see {folder / 'output.txt'}"
        )
    first, last = marks[given.skip], marks[-1]
    images = given.batch * (given.steps - given.skip)
    return {
        "images_per_second": images / (last["wall"] - first["wall"]),
        "cpu_seconds_per_image": (last["cpu"] - first["cpu"]) / images,
        "seconds_before_first_step_ended": marks[1]["wall"] - marks[0]["wall"],
    }


def flops_per_image(model: Path, size: int) -> float:
    """Floating-point operations of one sample's forward and backward pass of the UNet, counted by torch."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config = UNet2DConditionModel.load_config(model / "unet")
    levels = len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config) | {"in_channels": 8})
        x = torch.zeros(1, 8, *[size // 2 ** (levels - 1)] * 2)
        text = torch.zeros(1, 77, config["cross_attention_dim"])
        times = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            unet(x, times, text).sample.sum().backward()
    return float(counter.get_total_flops())


def product_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of one large matrix product, the best of several."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def table(results: dict[str, list[dict[str, float]]], flops: float, rate: float) -> str:
    """A line a contestant: medians over the rounds, and their ratio to diffusers' rate."""

    def median(who: str, key: str) -> float:
        return statistics.median(run[key] for run in results[who])

    base = median("diffusers", "images_per_second") if "diffusers" in results else float("nan")
    base_cpu = median("diffusers", "cpu_seconds_per_image") if "diffusers" in results else float("nan")
    lines = [
        "| | images/s | times diffusers' | CPU s an image | of diffusers' | first step after | of products |",
        "|---|---|---|---|---|---|---|",
    ]
    for who in results:
        speed, cpu = median(who, "images_per_second"), median(who, "cpu_seconds_per_image")
        lines.append(
            f"| {who} | {speed:.3g} | {speed / base:.2f} | {cpu:.3g} | {cpu / base_cpu:.2f} "
            f"| {median(who, 'seconds_before_first_step_ended'):.1f} s | {speed * flops / rate:.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        times, device, threads, *words = sys.argv[2:]
        run_child(Path(times), device, int(threads), words)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' train_instruct_pix2pix.py")
    parser.add_argument("--gpu", action="store_true", help="SD 1.5's size, bf16, batch 32, on cuda")
    parser.add_argument("--part", type=int, help="each width of SD 1.5 divided by this; default 4, --gpu 1")
    parser.add_argument("--batch", type=int, help="default 4, --gpu 32")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, help="optimizer steps a run; default 10, --gpu 60")
    parser.add_argument("--skip", type=int, help="of them, not counted; default 3, --gpu 20")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="pictures are drawn anew each epoch; default 3 batches")
    parser.add_argument("--threads", type=int, help="default: every core; 1 where other work runs beside")
    parser.add_argument("--workers", type=int, help="processes that read pictures; default 0, --gpu 8")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32, --gpu bf16")
    parser.add_argument("--compile", action="store_true", help="ip2p train --compile")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--folder", type=Path, help="where models and runs are written; default: the system's"
    )
    parser.add_argument("--json", type=Path, help="write every number here")
    asked = parser.parse_args()
    if "diffusers" in asked.only and (asked.script is None or not asked.script.is_file()):
        parser.error("--script must name diffusers' train_instruct_pix2pix.py, or leave it out with --only")
    gpu = asked.gpu

    def either(value: Any, cpu_value: Any, gpu_value: Any) -> Any:
        return value if value is not None else gpu_value if gpu else cpu_value

    batch = either(asked.batch, 4, 32)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        root = Path(name)
        sizes = write_model(root / "model", part=either(asked.part, 4, 1), size=asked.size)
        data = write_pairs(root / "pairs", count=asked.pairs or 3 * batch, size=asked.size)
        given = Given(
            script=(asked.script or Path()).resolve(),
            model=root / "model",
            data=data,
            batch=batch,
            size=asked.size,
            steps=either(asked.steps, 10, 60),
            skip=either(asked.skip, 3, 20),
            threads=asked.threads or os.cpu_count() or 1,
            precision=either(asked.precision, "fp32", "bf16"),
            workers=either(asked.workers, 0, 8),
            device="cuda" if gpu else "cpu",
            compile=asked.compile,
        )
        results: dict[str, list[dict[str, float]]] = {who: [] for who in asked.only}
        for number in range(asked.rounds):
            for who in asked.only:  # in turn, so that what else runs here falls on all alike
                print(f"round {number + 1}: {who}", file=sys.stderr, flush=True)
                run = measure(who, given, root / f"{number}-{who.replace(' ', '')}")
                print(json.dumps(run), file=sys.stderr, flush=True)
                results[who].append(run)
        flops = flops_per_image(given.model, given.size)
        rate = product_rate(given.device, given.precision)
    print(table(results, flops, rate))
    if asked.json:
        import torch

        record = {
            "machine": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "parameters": sizes,
            "settings": {
                name: getattr(given, name)
                for name in ("batch", "size", "steps", "skip", "threads", "precision", "workers", "compile")
            },
            "unet_flops_per_image": flops,
            "product_flops_per_second": rate,
            "runs": results,
        }
        asked.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
