"""The commands that are killed, and the small models, tables and pictures they work on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import draw_pairs, must, write_model
from benchmarks.crash.harness import Target

STEPS, SAVE_EVERY = 40, 2  # of the training run
THINGS = (
    *("cat", "dog", "fox", "cow", "pig", "duck", "bird", "tree"),
    *("house", "car", "boat", "kite", "bus", "train", "tent", "robot"),
)
COLORS = ("red", "blue", "green", "white", "black", "pink")
PLACES = ("a field", "a forest", "a city", "the desert", "the mountains", "a harbor", "a garden", "the snow")
CAPTIONS = [f"a {c} {t} in {p}" for p, t, c in itertools.product(PLACES, THINGS, COLORS)]
WEATHERS = ("fog", "rain", "sunshine")
HALF = ("--image", "-1", "--caption", "-1", "--directional", "0")  # lets half of a random CLIP's pairs pass
CPU = ("--device", "cpu", "--dtype", "fp32")
ANY = ("kills", "sigterm", "two", "full-disk")
STAGED = ("kills", "processes", "process", "driver", "worker", "full-disk")


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint listed, 0 without one."""
    from ip2p.training.checkpoints import Checkpoints

    return max((row["step"] for row in Checkpoints(output / "training").rows()), default=0)


def saved_steps(output: Path) -> Counter[str]:
    return Counter(f"step {step}" for step in range(SAVE_EVERY, newest_step(output) + 1, SAVE_EVERY))


def training_state(output: Path) -> dict[str, Any]:
    """The newest checkpoint's values by name, tensors as bytes, and the UNet that was written."""
    from ip2p.training.checkpoints import Checkpoints

    state = Checkpoints(output / "training").load()
    must(state is not None, f"no checkpoint in {output}")
    assert state is not None
    flat = dict(flatten({name: state[name] for name in ("step", "model", "ema", "optimizer")}, ""))
    return flat | {path.name: path.read_bytes() for path in (output / "unet").glob("*.safetensors")}


def flatten(value: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves of nested dicts and lists, each with its path; tensors become comparable."""
    import torch

    if isinstance(value, dict):
        return [leaf for key in value for leaf in flatten(value[key], f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for number, item in enumerate(value) for leaf in flatten(item, f"{name}.{number}")]
    if isinstance(value, torch.Tensor):
        return [(name, (str(value.dtype), value.shape, value.contiguous().view(-1).numpy().tobytes()))]
    return [(name, value)]


def checkpoint_disk(output: Path) -> int:
    """Bytes of a disk on which two checkpoints fit, but no third one beside them."""
    return int(2.5 * max(path.stat().st_size for path in (output / "training").glob("step-*.pt")))


def train_words(root: Path, output: Path) -> list[str]:
    return [
        *("train", "--data", str(root / "pairs-32"), "--base", str(root / "model"), "--output", str(output)),
        *("--steps", str(STEPS), "--size", "32", "--batch", "4", "--micro-batch", "2"),
        *("--precision", "fp32", *CPU, "--cache", str(root / "cache"), "--save-every", str(SAVE_EVERY)),
        *("--validate-every", "0", "--track", "none"),
    ]


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="instruct",
            words=lambda root, output: [
                *("synth", "instruct", str(root / "captions.txt"), "-o", str(output)),
                *("--model", str(root / "lm"), *CPU),
            ],
            output="triples.parquet",
            ways=STAGED,
            notes=True,
        ),
        Target(
            name="pairs",
            words=lambda root, output: [
                *("synth", "pairs", str(root / "triples.parquet"), "-o", str(output)),
                *("--model", str(root / "painter"), *CPU, "--steps", "2", "--most", "2", *HALF),
            ],
            output="pairs",
            ways=STAGED,
            notes=True,
        ),
        Target(
            name="filter",
            words=lambda root, output: [
                *("synth", "filter", str(root / "unfiltered"), "-o", str(output)),
                *("--clip", str(root / "painter" / "clip"), "--device", "cpu", "--top", "0", *HALF),
            ],
            output="kept",
            ways=STAGED,
            notes=True,
        ),
        Target(
            name="batch",
            words=lambda root, output: [
                *("edit", str(root / "pages"), "make it night", "-o", str(output), "--seed", "1"),
                *("--steps", "3", "--batch-size", "2", *CPU),
            ],
            output="edited",
            ways=ANY,
        ),
        Target(
            name="convert",
            words=lambda root, output: [
                *("data", "convert", "storybook", str(output), "--to", "shards", "--size", "64"),
                *("--count", "240", "--shard-rows", "10"),
            ],
            output="shards",
            ways=ANY,
        ),
        Target(
            name="train",
            words=train_words,
            output="editor",
            ways=ANY,
            result=training_state,
            committed=saved_steps,
            disk=checkpoint_disk,
        ),
    )
}
GROUPS = {"jobs": ("instruct", "pairs", "filter")}


# --- inputs ---------------------------------------------------------------------------------------


def write_inputs(root: Path, names: list[str]) -> int:
    """Write everything that the named targets read."""
    if {*GROUPS["jobs"], "server"} & set(names):
        (root / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
        write_lm(root / "lm")
    if {"pairs", "filter"} & set(names):
        write_model(root / "painter", part=20, blocks=2, layers=1, text_layers=1, size=16)
        write_clip(root / "painter" / "clip")
        write_tables(root)
    if "batch" in names:
        from ip2p.cli.main import main

        words = ["storybook", "draw", "--count", "24", "--size", "64", "-o", str(root / "pages")]
        must(main(words) == 0, "the pages were not drawn")
    if "train" in names:
        write_model(root / "model", part=8, blocks=2, layers=1, text_layers=1, size=32)
        draw_pairs(root / "pairs-32", count=24, size=32)
        draw_pairs(root / "other-pairs", count=20, size=32)
    return 0


def write_clip(folder: Path) -> None:
    """Write a random CLIP for the tokenizer beside it."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)


def some_triples(count: int) -> list[Any]:
    from ip2p.synth.records import Triple, triple_id

    chosen = [(caption, WEATHERS[k % len(WEATHERS)]) for k, caption in enumerate(CAPTIONS[:count])]
    return [
        Triple(
            id=triple_id(caption, 0),
            caption=caption,
            instruction=f"add {weather}",
            edited_caption=f"{caption}, {weather}",
        )
        for caption, weather in chosen
    ]


def write_lm(folder: Path) -> None:
    """Train a language model that has just learned how edits of these captions look: most of them parse."""
    from ip2p.synth.instruct import completion_of, prompt_of
    from ip2p.synth.tune import new_lm, tune_lm

    triples = some_triples(240)
    base = folder.with_name("lm-base")
    texts = [prompt_of(triple.caption) + completion_of(triple) for triple in triples]
    new_lm(texts, base, vocabulary=320, width=64, layers=2, heads=2, context=256)
    tuning = {"epochs": 6, "rate": 5e-3, "batch": 16}
    tune_lm(base, folder, triples, **tuning, backend="plain", device="cpu", say=lambda line: None)


def write_tables(root: Path, triples: int = 96, pairs: int = 3500) -> None:
    """Write triples, and pairs of pictures that have no scores yet."""
    import numpy as np
    import pyarrow.parquet as pq

    from ip2p.data.records import Pair
    from ip2p.synth.filter import pair_row, pair_table
    from ip2p.synth.records import write_triples

    write_triples(root / "triples.parquet", some_triples(triples))
    draw = np.random.default_rng(0)
    (root / "unfiltered").mkdir()
    rows = []
    for number, triple in enumerate(itertools.islice(itertools.cycle(some_triples(len(CAPTIONS))), pairs)):
        before, after = draw.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        words = {"instruction": triple.instruction, "caption": triple.caption}
        words["edited_caption"] = triple.edited_caption
        rows.append(pair_row(Pair(id=f"{triple.id}-{number:05}", before=before, after=after, **words)))
    pq.write_table(pair_table(rows), root / "unfiltered" / "train.parquet", row_group_size=100)


def preload() -> None:
    """Import what the commands import, so that forked processes share it."""
    import importlib

    import diffusers
    import transformers

    for module in (
        *("ip2p.cli.synth", "ip2p.cli.edit", "ip2p.cli.data", "ip2p.synth.tune"),
        *("ip2p.data.loading", "ip2p.training.trainer", "ip2p.training.checkpoints"),
    ):
        importlib.import_module(module)
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionInstructPix2PixPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPModel", "CLIPTextModel", "CLIPTokenizer", "LlamaForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)
