"""Tunes a language model to write edits (all weights or a LoRA), or creates a small untrained one."""

from __future__ import annotations

import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ip2p.base import terminal
from ip2p.base.devices import has_fast_bf16, pick_device
from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import make_folder, write_text
from ip2p.models.export import replacing_folder
from ip2p.models.load import quiet
from ip2p.settings import COMMAND_LINE
from ip2p.synth.instruct import (
    MAX_TOKENS,
    MIDDLE,
    SEPARATOR,
    STOP,
    TEMPERATURE,
    completion_of,
    load_lm,
    prompt_of,
)
from ip2p.synth.records import Triple, derived_seed
from ip2p.synth.settings import SynthTuneConfig
from ip2p.synth.triples import seed_triples

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ip2p.synth.arguments import TuneArguments

IGNORED = -100  # the label that the loss of transformers ignores
END = "<|end|>"
UNKNOWN = "<|unknown|>"
CARD = "ip2p.json"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of a tuning. losses: the mean loss of each step, in nats per answer token."""

    steps: int
    losses: tuple[float, ...]
    left_out: int  # triples longer than max_length


def tune_lm(
    base: str | Path,
    output: Path,
    triples: Sequence[Triple] | None = None,
    *,
    say: Callable[[str], None] = terminal.say,
    **settings: Unpack[TuneArguments],
) -> Tuned:
    """Tune a causal language model on triples (by default the seeds) and write it to the folder `output`.

    The loss covers the answers, not the captions. settings: fields of `SynthTuneConfig`, such as `lora`,
    `epochs` and `rate`. backend: "trl" is TRL's SFTTrainer, which can use several devices with
    `accelerate launch`; "plain" is the loop here, which needs only torch; "auto" uses TRL if it is installed.
    The output is a complete model in fp32 that any language model server can load, with the paper's sampling
    values in its generation config. It replaces `output` atomically. Raises InputError for settings out of
    range, a missing package, or triples that are all too long, and ModelError for `base`.
    """
    config = SynthTuneConfig.read({**settings, "base": str(base), "out": output}, COMMAND_LINE)
    rate = config.rate or (5e-5 if config.lora is None else 2e-4)
    triples = seed_triples() if triples is None else triples
    if not triples:
        raise InputError("there are no triples to tune on; choose a file with triples.")
    use_trl = config.backend == "trl" or (config.backend == "auto" and _has_trl())
    if use_trl and not _has_trl():
        raise InputError("--backend trl needs TRL, which is not installed: pip install 'ip2p[llm]'")
    make_folder(output.parent)
    model, tokenizer = load_lm(base, revision=config.revision)
    rows = [row for triple in triples if len(row := row_of(triple, tokenizer)) <= config.max_length]
    if not rows:
        raise InputError(
            f"all {len(triples):,} triples are longer than {config.max_length} tokens; raise --max-length."
        )
    left_out = len(triples) - len(rows)
    if left_out:
        say(f"skipping {left_out:,} triples longer than {config.max_length} tokens")
    if config.lora is not None:
        model = _with_lora(model, config.lora, config.seed)
    losses = (_train_trl if use_trl else _train)(model, rows, tokenizer, config, rate, say)
    model.eval()
    if config.lora is not None:
        model = model.merge_and_unload()
    named = ("lora", "epochs", "batch", "warm_up", "weight_decay", "clip_norm", "max_length", "seed")
    card = {
        "made_by": "ip2p synth tune-lm",
        "base": Path(base).name if Path(base).is_dir() else str(base),
        "triples": len(rows),
        "backend": "trl" if use_trl else "plain",
        "tuning": {name: getattr(config, name) for name in named} | {"rate": rate},
        "loss": losses[-1] if losses else None,
    }
    save_lm(model, tokenizer, output, card)
    return Tuned(steps=len(losses), losses=tuple(losses), left_out=left_out)


@dataclass(frozen=True)
class Row:
    """A tokenized triple; the loss covers the tokens from `start` on."""

    tokens: tuple[int, ...]
    start: int

    def __len__(self) -> int:
        return len(self.tokens)


def row_of(triple: Triple, tokenizer: Any) -> Row:
    """The tokens of a triple: prompt, answer and end token."""
    # Tokenized separately, as in generation: in the joined text, a token could span the boundary.
    prompt = tokenizer(prompt_of(triple.caption))["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and prompt and prompt[-1] == end:
        prompt = prompt[:-1]
    answer = tokenizer(completion_of(triple), add_special_tokens=False)["input_ids"]
    ends = [] if end is None else [end]
    return Row((*prompt, *answer, *ends), len(prompt))


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("tuning a LoRA needs PEFT: pip install 'ip2p[llm]'") from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"this model does not support LoRA ({error}); tune all weights.") from None


def order(count: int, *, epochs: float, batch: int, seed: int) -> list[list[int]]:
    """The rows of each step, shuffled in each epoch; the last step may be smaller."""
    places: list[int] = []
    total = max(1, round(count * epochs))
    for epoch in range(math.ceil(total / count)):
        shuffled = list(range(count))
        random.Random(derived_seed("tune", seed, epoch)).shuffle(shuffled)
        places += shuffled
    return [places[start : min(start + batch, total)] for start in range(0, total, batch)]


def rate_at(step: int, steps: int, warm_up: float) -> float:
    """The learning rate factor at step 0 … steps - 1: linear warm-up, then cosine decay."""
    warm = math.ceil(warm_up * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_of(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels, [rows, longest], padded on the right."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        values = torch.tensor(row.tokens)
        tokens[number, : len(row)] = values
        mask[number, : len(row)] = 1
        labels[number, row.start : len(row)] = values[row.start :]
    return tokens, mask, labels


def _train(
    model: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    config: SynthTuneConfig,
    rate: float,
    say: Callable[[str], None],
) -> list[float]:
    """The plain loop: AdamW on the mean loss per answer token of a batch."""
    torch.manual_seed(config.seed)  # for dropout, if the model has it
    device = pick_device(config.device)
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        # No weight decay for biases and norm scales.
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = order(len(rows), epochs=config.epochs, batch=config.batch, seed=config.seed)
    losses: list[float] = []
    with terminal.progress("tune", len(steps)) as advance:
        for step, places in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, len(steps), config.warm_up)
            batch = batch_of([rows[place] for place in places], tokenizer.pad_token_id or 0)
            tokens, mask, labels = (tensor.to(device) for tensor in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"the loss is {value} at step {step + 1}; use a lower --rate.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value)
            advance()
            if (step + 1) % max(1, len(steps) // 10) == 0:
                say(f"step {step + 1:,} of {len(steps):,}: loss {value:.3f}")
    return losses


def _has_trl() -> bool:
    return all(find_spec(name) is not None for name in ("trl", "datasets"))


def _train_trl(
    model: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    config: SynthTuneConfig,
    rate: float,
    say: Callable[[str], None],
) -> list[float]:
    """Training with TRL: the same rows, labels, optimizer and learning rates, but TRL's row order."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    device = pick_device(config.device)
    data = Dataset.from_dict(
        {
            "input_ids": [list(row.tokens) for row in rows],
            "completion_mask": [[int(n >= row.start) for n in range(len(row))] for row in rows],
        }
    )
    with tempfile.TemporaryDirectory() as scratch:  # TRL requires a checkpoint folder
        arguments = SFTConfig(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(config.warm_up * math.ceil(len(rows) * config.epochs / config.batch)),
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip_norm,
            max_length=config.max_length,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=device.type == "cuda" and has_fast_bf16(device),
            use_cpu=device.type == "cpu",
            seed=config.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)  # it prints each step to stdout
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        say(f"{len(losses):,} steps: loss {losses[-1]:.3f}")
    return losses


def save_lm(model: Any, tokenizer: Any, folder: Path, card: dict[str, Any] | None = None) -> None:
    """Write a language model, replacing `folder` atomically: a kill leaves the old or the new model."""
    from transformers import GenerationConfig

    # `transformers serve` uses these values as defaults, and samples only if `do_sample` is set here.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with replacing_folder(folder) as temporary, quiet():
        model.to("cpu").save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / CARD, json.dumps(card or {}, indent=1) + "\n")


def new_lm(
    texts: Iterable[str],
    folder: Path,
    *,
    vocabulary: int = 2048,
    width: int = 256,
    layers: int = 6,
    heads: int = 4,
    inner: int | None = None,
    context: int = 512,
    phrases: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Write a small untrained Llama model, with a byte-pair tokenizer trained on `texts`.

    It is a base for `tune_lm` when no pretrained model is available; a small language can be learned from
    scratch. width: of the residual stream, a multiple of 2 * heads. inner: of the MLP layers, by default 8/3
    of the width. phrases: if given, each token is one of these phrases (of any length) or a word of the
    texts, most common first; other words are spelled in ASCII letters, digits and signs, and other characters
    are lost. Raises InputError.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if vocabulary < 300:
        raise InputError(f"a vocabulary of {vocabulary} is too small; use 300 or more.")
    if width % (2 * heads):
        raise InputError(
            f"a width of {width} does not split over {heads} heads; use a multiple of {2 * heads}."
        )
    if phrases is None:
        raw, lost = _pair_tokenizer(texts, vocabulary), {}
    else:
        raw, lost = _word_tokenizer(texts, vocabulary, phrases), {"unk_token": UNKNOWN}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END, **lost)
    tokenizer.model_max_length = context
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=inner or -(-8 * width // 3 // 32) * 32,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=context,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    make_folder(folder.parent)
    save_lm(model, tokenizer, folder, {"made_by": "ip2p", "base": "none"})


def _pair_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return raw


def _word_tokenizer(texts: Iterable[str], vocabulary: int, phrases: Sequence[str]) -> Any:
    """A BPE tokenizer without merges: any text that is not a phrase or word is split into characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # In the splitter's notation: a space is the first character of the next word.
    letters = [split.pre_tokenize_str(chr(code))[0][0] for code in (10, *range(32, 127))]
    raw = Tokenizer(models.BPE())
    raw.add_special_tokens([AddedToken(token, special=True) for token in (END, UNKNOWN)])
    whole = [SEPARATOR, MIDDLE, STOP, *phrases]
    raw.add_tokens([AddedToken(text, normalized=False) for text in whole])
    raw.pre_tokenizer = split
    known = [END, UNKNOWN, *whole, *letters]
    counts: Counter[str] = Counter()
    pieces = re.compile("|".join(map(re.escape, sorted(whole, key=len, reverse=True))))
    for text in texts:
        counts.update(word for part in pieces.split(text) for word, _ in split.pre_tokenize_str(part))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    tokens = [*known, *words][:vocabulary]
    raw.model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token=UNKNOWN,
        ignore_merges=True,  # a word in the vocabulary is one token
    )
    raw.decoder = decoders.ByteLevel()
    return raw
