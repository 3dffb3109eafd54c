"""What else a long training run meets: damaged checkpoints, NaN gradients, changed settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

from benchmarks.common import must
from benchmarks.crash.harness import Bench, Target, Trial
from benchmarks.crash.targets import STEPS, newest_step


def run_halves(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """2N steps against N, kill -9, N"""
    bench.undisturbed(target)
    runs = bench.runs(target, way)
    process = runs.start()
    process.wait_for(lambda: newest_step(runs.output) >= STEPS // 2, f"step {STEPS // 2}")
    process.kill()
    must(newest_step(runs.output) < STEPS, "it had ended before the kill, which thus tried nothing")
    runs.run()
    bench.compare(runs)
    yield f"train, {way}: HOLDS. {STEPS} steps against {STEPS // 2}, kill, {STEPS // 2}: bit-identical"


def truncate_checkpoint(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """The newest checkpoint is cut off; then all are."""
    runs = bench.runs(target, way)
    runs.run("--steps", STEPS // 2)
    checkpoints = runs.output / "training"
    before, newest = sorted(checkpoints.glob("step-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    messages = runs.run()
    must(newest.name in messages and "checkpoint before" in messages, f"no warning: {messages}")
    bench.compare(runs)
    for file in checkpoints.glob("step-*.pt"):
        os.truncate(file, 100)
    messages = runs.run("--steps", 2 * STEPS, code=2)
    must("no checkpoint" in messages, f"the reason is not named: {messages}")
    yield (
        f"train, {way}: HOLDS. half of {newest.name}: a warning, {before.name} taken, bit-identical; all "
        "damaged: exit 2, nothing overwritten"
    )


def poison_gradients(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """Gradients that are not finite, from instructions with one word"""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    from ip2p.data.loading import open_source
    from ip2p.training.checkpoints import Checkpoints

    base = bench.root / "poisoned"
    shutil.copytree(bench.root / "model", base)
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    source = open_source(str(bench.root / "pairs-32"))
    instructions = [source[row].instruction for row in range(len(source))]
    words = sorted({word for text in instructions for word in text.split()})
    # A word of a third of the instructions: most batches then have one, and not every sample has.
    share = {word: sum(word in text.split() for text in instructions) / len(instructions) for word in words}
    word = min(words, key=lambda word: abs(share[word] - 0.3))
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    numbers = [i for i in tokenizer(word).input_ids if i not in tokenizer.all_special_ids]
    with torch.no_grad():
        encoder.get_input_embeddings().weight[numbers] = 1e38
    encoder.save_pretrained(base / "text_encoder")
    runs = bench.runs(target, way)
    messages = runs.run("--base", base, code=3)
    skipped = runs.output / "training" / "not-applied.jsonl"
    must(str(skipped) in messages, f"the file is not named: {messages[-400:]}")
    row = json.loads(skipped.read_text().splitlines()[0])
    must(len(row["ids"]) == 4, f"ids of the batch: {row}")

    def saved() -> tuple[int, bool]:
        state = Checkpoints(runs.output / "training").load()
        assert state is not None
        return state["step"], all(torch.isfinite(tensor).all() for tensor in state["model"].values())

    must(saved() == (row["step"], True), f"saved {saved()}, and step {row['step']} was not finite")
    runs.run("--base", base, "--nan-steps", 1000)
    must(saved()[1], "weights that are not finite in the end")
    count = len({json.loads(line)["step"] for line in skipped.read_text().splitlines()})
    yield (
        f"train, {way}: HOLDS. stops at step {row['step']} with exit 3 and the batch's ids saved; "
        f"--nan-steps 1000: {count} of {STEPS} steps not applied; weights finite"
    )


def change_settings(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """Another setting when a run goes on is refused by name."""
    runs = bench.runs(target, way)
    runs.run("--steps", 2)
    changes = {
        "lr": ("--lr", "2e-4"),
        "batch": ("--batch", "8"),
        "seed": ("--seed", "1"),
        "text_null": ("--text-null", "0.1"),
        "no_flip": ("--no-flip",),
        "data": ("--data", bench.root / "other-pairs"),
    }
    for name, words in changes.items():
        messages = runs.run(*words, code=2)
        flag = name.replace("_", "-")
        must(flag in messages, f"{flag} is not named: {messages[-400:]}")
    runs.run()
    bench.compare(runs)
    yield f"train, {way}: HOLDS. {', '.join(changes)}: each refused by name with exit 2"


WAYS: dict[str, Trial] = {
    "half": run_halves,
    "truncated": truncate_checkpoint,
    "nan": poison_gradients,
    "changed": change_settings,
}
