"""Measure the peak memory of loading a full-size SD 1.5 editor from a single file (Linux).

    python -m benchmarks.speed loading                 # 2.1 GB of random fp16 weights, made on the spot
    python -m benchmarks.speed loading --dtype bf16    # loaded in another number format than the file's

A new process imports the libraries, loads the file, touches every weight, and reports its peak memory:
beside the libraries, and in all. `--most 1.3` exits 1 when the former is above 1.3 times the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SD15 = {
    "unet": {
        "in_channels": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": CLIP_L,
}
# The same blocks, to try the benchmark in a second.
TINY: dict[str, dict[str, Any]] = {
    "unet": SD15["unet"] | {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 64},
    "vae": SD15["vae"] | {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": CLIP_L | {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1},
}
CHILD = """
import json, sys
import torch, diffusers, transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from ip2p.base.devices import DTYPE_ALIASES, DTYPES
from ip2p.models.bundle import load_bundle

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS")
bundle = load_bundle(sys.argv[1], dtype=DTYPES[DTYPE_ALIASES[sys.argv[2]]])
loaded = status("VmHWM")
for part in (bundle.unet, bundle.vae, bundle.text_encoder):
    for weight in part.parameters():
        weight.view(-1)[:: 64].float().sum()
print(json.dumps({"libraries": before, "peak_loading": loaded, "peak": status("VmHWM")}))
"""


def write_single_file(path: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Write random fp16 weights in the LDM layout, with the storybook's tokenizer."""
    import torch

    from ip2p.models import keys
    from ip2p.models.bundle import find_model
    from ip2p.models.export import Item, write_safetensors
    from ip2p.models.load import TOKENIZERS_ENTRY, empty_network, ldm_table, open_model, packed

    items = []
    for part, config in configs.items():
        network = empty_network(part, config)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        table = ldm_table(part, list(shapes), config, {}, "SD 1.x")
        stored = {place.key: keys.stored_shape(place, shapes[name]) for name, place in table.items()}
        items += [
            Item(key, shape, torch.float16, lambda shape=shape: torch.randn(shape).half() / 30)
            for key, shape in stored.items()
        ]
    tokenizers = open_model(find_model("storybook")).tokenizers
    write_safetensors(path, items, {"format": "pt", TOKENIZERS_ENTRY: packed(tokenizers)})


def measure_loading(path: Path, dtype: str) -> dict[str, float]:
    """Load in a new process; returns bytes, and the peaks as shares of the file."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), dtype], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    size = path.stat().st_size
    return {
        "file": size,
        **found,
        "peak_beside_libraries_per_file": round((found["peak"] - found["libraries"]) / size, 3),
        "peak_per_file": round(found["peak"] / size, 3),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--most", type=float, help="exit 1 above so many files beside the libraries")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the benchmark")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "editor.safetensors"
        write_single_file(path, TINY if args.tiny else SD15)
        found = measure_loading(path, args.dtype)
    print(json.dumps({"dtype": args.dtype, **found}, indent=2))
    return int(args.most is not None and found["peak_beside_libraries_per_file"] > args.most)
