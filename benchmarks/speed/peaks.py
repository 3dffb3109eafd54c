"""Peak memory of loading and editing at the sizes of SD 1.5 and SDXL, beside the estimate (Linux, CUDA).

    python -m benchmarks.speed peaks                              # SD 1.5's size, bf16, 256 and 512 pixels
    python -m benchmarks.speed peaks --model sdxl --pixels 1024 --count 1 4 --memory auto low

Weights are zeros; only their shapes matter. Each row is a new process, which imports the libraries, edits
with a small model, and then counts: weights and anonymous memory on a CPU, torch's own count on CUDA.
"estimate" is what `ip2p.models.memory` compares with the free memory. Its share should be 0.85 to 1.15.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine_name, measure_apart, table
from benchmarks.speed.loading import CLIP_L, SD15, TINY

if TYPE_CHECKING:
    from torch import Tensor

OPENCLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def configs_of(model: str) -> dict[str, dict[str, Any]]:
    """The configs of a model's networks by the names of their parts."""
    from benchmarks.speed.memory import XL

    if model == "sdxl":
        vae = SD15["vae"] | {"sample_size": 1024, "scaling_factor": 0.13025}
        return {"unet": XL, "vae": vae, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_G}
    configs = SD15 if model == "sd15" else TINY
    return configs | {"vae": configs["vae"] | {"sample_size": 512}}


def write_zeros(folder: Path, model: str, dtype: str) -> None:
    """Write an editor whose weights are all 0, with the storybook's tokenizer and scheduler."""
    import torch
    from transformers import CLIPTokenizer

    from ip2p.base.devices import DTYPE_ALIASES, DTYPES
    from ip2p.models.bundle import find_model
    from ip2p.models.load import empty_network
    from ip2p.models.save import write_editor

    networks = {part: empty_network(part, config) for part, config in configs_of(model).items()}
    weight = torch.tensor(0.0)
    states = {
        part: {name: weight.expand(tensor.shape) for name, tensor in network.state_dict().items()}
        for part, network in networks.items()
    }
    tokenizer = CLIPTokenizer.from_pretrained(find_model("storybook") / "tokenizer", model_max_length=77)
    names = ["tokenizer", "tokenizer_2"] if model == "sdxl" else ["tokenizer"]
    scheduler = {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    write_editor(
        folder,
        networks,
        dict.fromkeys(names, tokenizer),
        scheduler,
        dtype=DTYPES[DTYPE_ALIASES[dtype]],
        states=states,
        card={},
    )


def read_status(name: str) -> int:
    """Bytes from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def mapped_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of the weights that are pages of a file; those of a weight that was copied do not count."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        tuple(int(end, 16) for end in line[0].split("-"))
        for line in lines
        if line[-1].endswith(".safetensors")
    ]
    sizes = {weight.data_ptr(): weight.nbytes for weight in weights}
    return sum(size for place, size in sizes.items() if any(low <= place < high for low, high in spans))


class Peak:
    """The most memory in use within the block: `bytes` beside what was in use when this was made.

    CPU: anonymous pages, looked at every 5 ms.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.before = 0 if self.cuda else read_status("RssAnon")
        self.bytes = 0

    def __enter__(self) -> Peak:
        import torch

        self.bytes, self.ended = 0, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self.ended.set()
            self.thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, read_status("RssAnon") - self.before)
            if self.ended.wait(0.005):
                return


def measure_edit(
    model: str, device: str, dtype: str, memory: Any, pixels: int, count: int
) -> dict[str, float]:
    """In a process of its own: bytes at the peak of loading, at the peak of an edit, and the estimate."""
    import torch
    from PIL import Image

    from ip2p.base.devices import return_freed_memory
    from ip2p.editing.editor import Editor
    from ip2p.models.memory import choose_memory, footprint

    # A small model first: what libraries take once, they have then.
    with tempfile.TemporaryDirectory() as folder:
        write_zeros(Path(folder) / "tiny", "tiny", dtype)
        small = Editor.load(Path(folder) / "tiny", device=device, dtype=dtype)
        small.edit(Image.new("RGB", (128, 128)), "make it night", steps=1, size=128)
        del small
    peak = Peak(device)
    with peak:
        editor = Editor.load(model, device=device, dtype=dtype, memory=memory)
    bundle = editor.bundle
    parts = [bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2]
    mapped = mapped_bytes(weight for part in parts if part is not None for weight in part.parameters())
    loading = peak.bytes + mapped
    need = footprint(editor.bundle)
    size = (pixels, pixels)
    away = next(editor.bundle.unet.parameters()).device.type != torch.device(device).type
    plan = choose_memory(need, memory, None, size, batch=count, device=device, offload=away)
    return_freed_memory()  # or what loading freed would count
    with peak:
        editor.edit(
            Image.new("RGB", size),
            "make it night",
            seeds=range(count),
            steps=1,
            size=pixels,
            batch_size=count,
        )
    return {"loading": loading, "editing": peak.bytes + mapped, "estimate": need.peak(plan, size, count)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=("sd15", "sdxl", "tiny"), default=["sd15"])
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--count", type=int, nargs="+", default=[1], help="pictures at once")
    parser.add_argument("--memory", nargs="+", choices=("auto", "low"), default=["auto"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.child:
        model, memory, pixels, count = args.child
        print(json.dumps(measure_edit(model, args.device, args.dtype, memory, int(pixels), int(count))))
        return 0
    rows: list[list[object]] = []
    for model in args.model:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "editor"
            write_zeros(path, model, args.dtype)
            for memory, pixels, count in itertools.product(args.memory, args.pixels, args.count):
                words = ["peaks", "--device", args.device, "--dtype", args.dtype]
                found = measure_apart(*words, "--child", path, memory, pixels, count)
                sizes = [f"{found[name] / 1e9:.2f}" for name in ("loading", "editing", "estimate")]
                share = found["estimate"] / found["editing"]
                rows.append([model, memory, pixels, count, *sizes, f"{share:.2f}"])
                print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{machine_name(args.device)}; {args.dtype}; GB\n")
    heads = ["model", "memory", "pixels", "at once", "loading", "editing", "estimate", "estimate / editing"]
    print(table(heads, rows))
    return 0
