"""Pictures a second of `ip2p train` beside diffusers' own InstructPix2Pix training script.

    python -m benchmarks.speed train --script train_instruct_pix2pix.py          # here, a small model
    python -m benchmarks.speed train --script train_instruct_pix2pix.py --gpu    # one GPU, SD 1.5's size

The script is examples/instruct_pix2pix/train_instruct_pix2pix.py of diffusers' repository; it is not part of
this package. It needs `datasets`; without torchvision, the transforms that it uses are replaced by the same
torch operations.

Both train the same random model (a UNet of 4 channels, which both widen to 8) on the same storybook pairs,
with AdamW, EMA, clipping, dropout of the conditions and flips, at the same batch, size, precision and number
of threads. Each runs in its own process, in turn, `--rounds` times; a time is taken after each optimizer
step, and the first `--skip` steps are left out. CPU seconds (of all threads) hardly change when other work
shares the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from benchmarks.common import ENVIRONMENT, ROOT, draw_pairs, machine_name, table, write_model

CONTESTANTS = ("ip2p", "ip2p --no-cache", "diffusers")


# --- a contestant, in a process of its own --------------------------------------------------------


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


def replace_torchvision() -> None:
    """Stand in for the transforms that diffusers' script uses, when torchvision is missing."""
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

    def crop(side: int, centered: bool) -> Any:
        def apply(x: Any) -> Any:
            rest = [length - side for length in x.shape[-2:]]
            y, x0 = (n // 2 if centered else int(torch.randint(0, n + 1, ())) for n in rest)
            return x[..., y : y + side, x0 : x0 + side]

        return apply

    def compose(steps: list[Any]) -> Any:
        def apply(x: Any) -> Any:
            for step in steps:
                x = step(x)
            return x

        return apply

    package, transforms = (types.ModuleType(f"torchvision{end}") for end in ("", ".transforms"))
    stand_ins = {
        "Compose": compose,
        "RandomCrop": lambda side: crop(side, False),
        "CenterCrop": lambda side: crop(side, True),
        "RandomHorizontalFlip": lambda: lambda x: x.flip(-1) if torch.rand(1) < 0.5 else x,
        "Lambda": lambda function: function,
    }
    vars(transforms).update(stand_ins)
    vars(package)["transforms"] = transforms
    for module in (package, transforms):
        module.__spec__ = ModuleSpec(module.__name__, loader=None)
        sys.modules[module.__name__] = module


def run_child(times: Path, device: str, threads: int, words: list[str]) -> None:
    """Run a script (a path) or the ip2p command line, and record the times of its steps."""
    import torch

    torch.set_num_threads(threads)
    program, *sys.argv = [words[0], *words]
    if program != "ip2p":
        replace_torchvision()
        import accelerate

        # Their trackers would need another package, and write during a step.
        accelerate.Accelerator.log = lambda *_, **__: None  # type: ignore[method-assign]
        accelerate.Accelerator.init_trackers = lambda *_, **__: None  # type: ignore[method-assign]
        original = accelerate.Accelerator.__init__
        accelerate.Accelerator.__init__ = lambda self, *a, log_with=None, **k: original(self, *a, **k)  # type: ignore[method-assign]
    record_steps(times, device == "cuda")
    if program == "ip2p":
        runpy.run_module("ip2p", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work, the same for each contestant."""

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


def words_of(who: str, work: Work, folder: Path) -> list[str]:
    """The contestant's command line."""
    if who == "diffusers":
        return [
            str(work.script),
            *("--pretrained_model_name_or_path", str(work.model), "--dataset_name", str(work.data)),
            *("--original_image_column", "original_image", "--edit_prompt_column", "edit_prompt"),
            *("--edited_image_column", "edited_image", "--output_dir", str(folder / "out")),
            *("--cache_dir", str(folder.parent / "datasets"), "--resolution", str(work.size)),
            *("--train_batch_size", str(work.batch), "--max_train_steps", str(work.steps)),
            *("--mixed_precision", {"fp32": "no"}.get(work.precision, work.precision)),
            *("--dataloader_num_workers", str(work.workers), "--checkpointing_steps", "1000000"),
            *("--conditioning_dropout_prob", "0.05", "--lr_warmup_steps", "0", "--seed", "0"),
            *("--random_flip", "--use_ema"),
        ]
    return [
        *("ip2p", "train", "--data", str(work.data), "--base", str(work.model)),
        *("--output", str(folder / "out"), "--size", str(work.size), "--steps", str(work.steps)),
        *("--batch", str(work.batch), "--micro-batch", str(work.batch), "--precision", work.precision),
        *("--workers", str(work.workers), "--device", work.device, "--save-every", "1000000"),
        *("--validate-every", "0", "--track", "none", "--seed", "0"),
        # A pool of one batch is encoded for each step, as diffusers does.
        *(["--no-cache", "--pool", str(work.batch)] if "--no-cache" in who else []),
        *([] if "--no-cache" in who else ["--cache", str(folder / "cache")]),
        *(["--compile"] if work.compile else []),
    ]


def time_training(who: str, work: Work, folder: Path) -> dict[str, float]:
    """Run one contestant once: pictures a second, CPU seconds a picture, seconds until the first step."""
    folder.mkdir(parents=True)
    times, messages = folder / "times.jsonl", folder / "output.txt"
    child = [sys.executable, "-m", "benchmarks.speed", "--child", str(times), work.device, str(work.threads)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": paths}
    if work.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(messages, "w") as file:
        command = [*child, *words_of(who, work, folder)]
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
    marks = [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []
    if done.returncode or len(marks) != work.steps + 1:
        raise SystemExit(
            f"{who} ended with {done.returncode} after {len(marks) - 1} of {work.steps} optimizer steps:\n"
            f"{messages.read_text()[-2000:]}"
        )
    first, last = marks[work.skip], marks[-1]
    pictures = work.batch * (work.steps - work.skip)
    return {
        "rate": pictures / (last["wall"] - first["wall"]),
        "cpu": (last["cpu"] - first["cpu"]) / pictures,
        "first_step": marks[1]["wall"] - marks[0]["wall"],
    }


def flops_per_picture(model: Path, size: int) -> float:
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
        with FlopCounterMode(display=False) as counter:
            unet(x, torch.zeros(1, dtype=torch.long), text).sample.sum().backward()
    return float(counter.get_total_flops())


def product_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of one large matrix product, the best of twenty."""
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


def results_table(results: dict[str, list[dict[str, float]]], flops: float, rate: float) -> str:
    """A row for each contestant: medians over the rounds, and the ratios to diffusers' medians."""
    medians = {
        who: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for who, runs in results.items()
    }
    base = medians.get("diffusers", {"rate": float("nan"), "cpu": float("nan")})
    heads = ("", "pictures/s", "× diffusers", "CPU s a picture", "× diffusers", "first step", "of products")
    rows = [
        [
            *(who, f"{found['rate']:.3g}", f"{found['rate'] / base['rate']:.2f}", f"{found['cpu']:.3g}"),
            *(f"{found['cpu'] / base['cpu']:.2f}", f"{found['first_step']:.1f} s"),
            f"{found['rate'] * flops / rate:.1%}",
        ]
        for who, found in medians.items()
    ]
    return table(heads, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--script", type=Path, help="diffusers' train_instruct_pix2pix.py")
    parser.add_argument("--gpu", action="store_true", help="SD 1.5's size, bf16, batch 32, on cuda")
    parser.add_argument("--part", type=int, help="each width of SD 1.5 divided by this; default 4, --gpu 1")
    parser.add_argument("--batch", type=int, help="default 4, --gpu 32")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, help="optimizer steps a run; default 10, --gpu 60")
    parser.add_argument("--skip", type=int, help="steps that are not counted; default 3, --gpu 20")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="default: three batches")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--workers", type=int, help="processes that read pictures; default 0, --gpu 8")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32, --gpu bf16")
    parser.add_argument("--compile", action="store_true", help="ip2p train --compile")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="write every number here")


def run(args: argparse.Namespace) -> int:
    if "diffusers" in args.only and (args.script is None or not args.script.is_file()):
        raise SystemExit(
            "--script must name diffusers' train_instruct_pix2pix.py; or leave it out: --only ip2p"
        )
    here = {"part": 4, "batch": 4, "steps": 10, "skip": 3, "workers": 0, "precision": "fp32"}
    gpu = {"part": 1, "batch": 32, "steps": 60, "skip": 20, "workers": 8, "precision": "bf16"}
    for name, value in (gpu if args.gpu else here).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        sizes = write_model(root / "model", part=args.part, size=args.size)
        work = Work(
            script=(args.script or Path()).resolve(),
            model=root / "model",
            data=draw_pairs(root / "pairs", count=args.pairs or 3 * args.batch, size=args.size),
            threads=args.threads or os.cpu_count() or 1,
            device="cuda" if args.gpu else "cpu",
            **{n: getattr(args, n) for n in (*here, "size", "compile") if n != "part"},
        )
        results: dict[str, list[dict[str, float]]] = {who: [] for who in args.only}
        for number in range(args.rounds):
            for who in args.only:  # in turn, so that other work on this machine falls on all alike
                results[who].append(time_training(who, work, root / f"{number}-{who.replace(' ', '')}"))
                print(f"round {number + 1}: {who}: {results[who][-1]}", file=sys.stderr, flush=True)
        flops, rate = flops_per_picture(work.model, work.size), product_rate(work.device, work.precision)
    print(f"{machine_name(work.device)}\n\n{results_table(results, flops, rate)}")
    if args.json:
        record = {"machine": machine_name(work.device), "parameters": sizes, "settings": asdict(work)}
        record |= {"unet_flops_per_picture": flops, "product_flops_per_second": rate, "runs": results}
        args.json.write_text(json.dumps(record, indent=2, default=str) + "\n")
    return 0
