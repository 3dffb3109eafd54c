"""Stage `text`: the tokenizer, and a text encoder that learns to classify instructions.

The editor is conditioned on this encoder and trains it further. Instructions are generated without pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ip2p.training.storybook.data import LOOSE_SHARE, Stream, read_ahead
from ip2p.training.storybook.heads import Heads, class_loss
from ip2p.training.storybook.presets import Preset
from ip2p.training.storybook.stage import Run, train_stage
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.labels import EDIT_SIZES, edit_labels
from ip2p_storybook.language import loosen, vocabulary
from ip2p_storybook.scene import rng_for

TEXT_TOKENS = 48  # enough for 99% of the captions and instructions


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer with one token per word of the storybook's language; others become bytes."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for entry in vocabulary() for word in entry.lower().split()}
    merges = learn_merges(piece for word in words for piece, _ in pieces.pre_tokenize_str(word))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + END for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TEXT_TOKENS
    )
    tokenizer.save_pretrained(folder)


END = "</w>"  # of a word, in CLIP's vocabularies


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until each word is one token.

    Ties are broken by spelling, because the order of the library's trainer is not reproducible.
    """
    spelled = [[*word[:-1], word[-1] + END] for word in sorted(set(words))]
    merges = []
    while counts := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in spelled:
            for k in range(len(word) - 2, -1, -1):
                if (word[k], word[k + 1]) == best:
                    word[k : k + 2] = ["".join(best)]
        spelled = [word for word in spelled if len(word) > 1]
    return merges


def load_tokenizer(run: Run) -> Any:
    """The tokenizer of the build, created at the first call."""
    from transformers import CLIPTokenizer

    if not (run.output / "tokenizer").exists():
        write_tokenizer(run.output / "tokenizer")
    return CLIPTokenizer.from_pretrained(run.output / "tokenizer")


def text_reader(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """Texts to padded tokens, int64 [texts, TEXT_TOKENS]."""
    return lambda texts: (
        tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
    )


def text_config(preset: Preset, tokenizer: Any) -> dict[str, Any]:
    """The settings of a text tower: of the text encoder and of CLIP."""
    return {
        "hidden_size": preset.text_width,
        "intermediate_size": 3 * preset.text_width,
        "num_attention_heads": max(1, preset.text_width // 48),
        "projection_dim": preset.text_width,
        "num_hidden_layers": preset.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def new_text_encoder(preset: Preset, tokenizer: Any) -> Any:
    """The untrained encoder, a CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_config(preset, tokenizer)))


class Instructions(Stream):
    """Instructions as tokens [batch, TEXT_TOKENS], and their `edit_labels` [batch, fields]."""

    def __init__(
        self,
        batch: int,
        seed: int,
        start: int = 0,
        *,
        tokens: Callable[[list[str]], Tensor],
        split: str = "train",
    ) -> None:
        super().__init__(batch, 0, seed, start)
        self.tokens, self.split = tokens, split

    def make(self, index: int) -> tuple[Tensor, Tensor]:
        texts, labels = [], []
        for i in range(self.batch):
            rng = rng_for("instruction", self.seed, index, i)
            edit = sample_edit(rng, split=self.split)
            loose = self.split == "train" and rng.random() < LOOSE_SHARE
            texts.append(loosen(edit.instruction, rng) if loose else edit.instruction)
            labels.append(torch.from_numpy(edit_labels(edit)))
        return self.tokens(texts), torch.stack(labels)


class InstructionTask(nn.Module):
    """The loss of classifying instructions: kind, thing before and after, and change of the page."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = Heads(encoder.config.hidden_size, EDIT_SIZES)

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, classes of all fields], from the last token, which attends to all others."""
        return self.heads(self.encoder(tokens).last_hidden_state[:, -1].float())

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens, labels = (part.to(self.encoder.device) for part in batch)
        logits = self.logits(tokens)
        right = logits[:, : EDIT_SIZES[0]].argmax(1) == labels[:, 0]
        return class_loss(logits, labels, EDIT_SIZES), {"kind": float(right.float().mean())}


def train_text(run: Run) -> None:
    """Write `tokenizer` and `text_tower`. Raises OutOfTime."""
    preset = run.preset
    tokenizer = load_tokenizer(run)
    torch.manual_seed(preset.seed)
    encoder = use_plain_attention(new_text_encoder(preset, tokenizer), run.device)
    tokens = text_reader(tokenizer)

    def batches(first: int) -> Iterator[list[Any]]:
        stream = Instructions(preset.text.batch, preset.seed + 6, first, tokens=tokens)
        return ([batch] for batch in read_ahead(stream, preset.workers))

    task = InstructionTask(encoder).to(run.device)
    keys = ("text_width", "text_layers")
    summary = train_stage(
        run, "text", task, preset.text, batches, fingerprint={key: getattr(preset, key) for key in keys}
    )
    measured = measure_text(task, tokens, run)
    encoder.save_pretrained(run.output / "text_tower")
    run.finish("text", {**summary, **measured})


@torch.no_grad()
def measure_text(task: InstructionTask, tokens: Callable[[list[str]], Tensor], run: Run) -> dict[str, float]:
    """The accuracy for the kind of edit on 512 new instructions, half of them with unseen phrasings."""
    measured = {}
    for split in ("test", "unseen_phrasings"):
        texts, labels = Instructions(256, run.preset.seed + 7, tokens=tokens, split=split).make(0)
        kinds = task.logits(texts.to(run.device))[:, : EDIT_SIZES[0]].argmax(1).cpu()
        measured[f"kind_{split}"] = round(float((kinds == labels[:, 0]).float().mean()), 4)
    run.log("text: " + ", ".join(f"{key} {value:.1%}" for key, value in measured.items()))
    return measured


def use_plain_attention(network: Any, device: torch.device) -> Any:
    """On a CPU, use attention without the fused kernel, whose backward pass is slower there."""
    if device.type == "cpu":
        network.set_attn_implementation("eager")
    return network
