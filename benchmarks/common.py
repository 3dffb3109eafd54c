"""What the three benchmarks share: options, tables, small random models, and processes that can be killed."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PATIENCE = 600.0  # seconds to wait for something that must happen


class Failed(Exception):
    """A promise that does not hold."""


def must(holds: object, otherwise: str) -> None:
    """Raise Failed with the message `otherwise` unless `holds`."""
    if not holds:
        raise Failed(otherwise)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with the option for the scratch folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for scratch files; default: the system's")
    return parser


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine_name(device: str = "cpu") -> str:
    """The GPU's or processor's name, with the number of cores."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# --- processes ------------------------------------------------------------------------------------


class Process:
    """A forked process. It shares the modules imported so far, since importing takes longer than the work.

    Its stderr goes to the file `log`.
    """

    started: list[Process] = []  # noqa: RUF012 - every process, so that none outlives a failed trial

    def __init__(self, main: Callable[[], int], log: Path) -> None:
        self.log, self.code = log, None
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            code = 70
            try:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.pid = pid
        self.code: int | None
        Process.started.append(self)

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.poll() is not None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        must(self.ends_within(PATIENCE), "a killed process does not end")

    def finish(self, code: int = 0) -> str:
        """Wait for its end and return its messages. Raises Failed unless it exits with `code`."""
        if not self.ends_within(PATIENCE):
            self.kill()
        must(self.code == code, f"exit {self.code}, not {code}: {self.messages()[-600:]}")
        return self.messages()

    def messages(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, happened: Callable[[], object], what: str) -> None:
        """Wait until it happened. Raises Failed if the process ends first, or after ten minutes."""
        until = time.monotonic() + PATIENCE
        while not happened():
            if self.poll() is not None and not happened():
                raise Failed(f"it ended ({self.code}) before {what}: {self.messages()[-600:]}")
            must(time.monotonic() < until, f"{what} did not come in {PATIENCE:.0f} seconds")
            time.sleep(0.005)

    @staticmethod
    def kill_all() -> None:
        while Process.started:
            Process.started.pop().kill()


def on_small_disk(*words: object) -> list[str]:
    """Run this program again with `words` where it may mount a small disk; returns its lines of stdout."""
    tool = shutil.which("unshare")
    must(tool, "unshare (util-linux) was not found, so no small disk can be made")
    child = [sys.executable, *map(str, words)]
    done = subprocess.run(
        [str(tool), "--map-root-user", "--mount", *child], capture_output=True, text=True, cwd=ROOT
    )
    must(done.returncode == 0, (done.stdout + done.stderr)[-800:])
    return done.stdout.splitlines()


def mount_disk(folder: Path, size: int, *, again: bool = False) -> None:
    """Mount a disk of `size` bytes at `folder`, or give the one there another size."""
    options = f"remount,size={size}" if again else f"size={size}"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def measure_apart(*words: object) -> dict[str, float]:
    """Run `python -m benchmarks.speed WORDS` in a process of its own; returns the JSON of its last line."""
    child = [sys.executable, "-m", "benchmarks.speed", *map(str, words)]
    done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(words: Sequence[str], health: str, log: Path | None = None, **more: Any) -> Iterator[Any]:
    """A server process, from when the address `health` answers 200; it is terminated at the end."""
    with open(log or os.devnull, "ab") as file:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | more.pop("env", {})
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, **more)
    try:
        until = time.monotonic() + PATIENCE
        while not answers(health):
            must(process.poll() is None, f"the server ended; its messages: {log and log.read_text()[-600:]}")
            must(time.monotonic() < until, "the server does not answer")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# --- models and pairs -----------------------------------------------------------------------------


def write_model(
    folder: Path,
    *,
    part: int = 4,
    blocks: int = 4,
    layers: int = 2,
    text_layers: int = 12,
    size: int = 256,
    in_channels: int = 4,
    dtype: str = "fp32",
) -> dict[str, int]:
    """Write a random model with the blocks of SD 1.5, each width divided by `part`; returns parameters.

    The tokenizer is the storybook's, whose words are those of the pairs, with SD's 77 tokens. `blocks` 2
    leaves out the inner two levels of both networks. `in_channels` 8 makes an editor.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ip2p.base.devices import DTYPE_ALIASES, DTYPES
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
        in_channels=in_channels,
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
    pipeline.to(DTYPES[DTYPE_ALIASES[dtype]]).save_pretrained(folder)
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def run_ip2p(*words: object) -> None:
    """Run the command line in a process of its own. Raises SystemExit with its code when it fails."""
    line = [str(word) for word in words]
    print("ip2p", *line, file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", "ip2p", *line], check=False).returncode
    if code:
        raise SystemExit(code)


def draw_pairs(folder: Path, *, count: int, size: int) -> Path:
    """Write storybook pairs as a parquet table; returns the folder."""
    from ip2p.cli.main import main

    folder.mkdir(parents=True)
    words = ["storybook", "draw", "--count", str(count), "--size", str(size)]
    if code := main([*words, "--pairs", str(folder / "train.parquet")]):
        raise SystemExit(code)
    return folder
