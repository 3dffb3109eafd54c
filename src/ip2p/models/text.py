"""Encodes texts: one encoder for SD 1.x and 2.x; two for SDXL, which also takes the picture's size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ip2p.base.errors import ModelError

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle


@dataclass(frozen=True)
class Prompt:
    """An encoded text, fp32. SDXL has all three fields, SD only the hidden states.

    hidden: [batch, tokens, features]. pooled: [batch, projected], the second encoder's summary.
    time_ids: [batch, 6], the height and width of the picture, its crop's top and left, and again its
    height and width.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


def encode_prompt(bundle: Bundle, text: str, size: tuple[int, int]) -> Prompt:
    """Encode one text for a picture of `size`, its width and height in pixels: `encode_prompts` of one."""
    return encode_prompts(bundle, [text], size)


def encode_prompts(bundle: Bundle, texts: Sequence[str], size: tuple[int, int]) -> Prompt:
    """Encode texts, a row each, for pictures of `size`, their width and height in pixels.

    SD: the encoder's last hidden state; the folder of an SD 2.x model leaves out the encoder's last
    layer, so that this is the penultimate one of OpenCLIP. SDXL: both encoders' penultimate hidden
    states side by side; an empty text is all zeros there if the model was trained so. A warning names
    text beyond the encoder's tokens. Raises ModelError for another size conditioning than SDXL's.
    """
    if bundle.kind == "sd":
        tokens = _tokens(bundle.tokenizer, texts, bundle.text_encoder.device)
        return Prompt(bundle.text_encoder(tokens)[0].float())
    return _encode_for_sdxl(bundle, texts, size)


_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_PART = re.compile(r"['\u2019]?[^\W\d_]+|\d+")


def unknown_words(instruction: str, tokenizer: Any) -> list[str]:
    """The words of an instruction that a model with a closed vocabulary does not know, as typed.

    tokenizer: of a model whose card has `closed_vocabulary: true`: each known word (and ending such as "'s")
    is a single token, and every other word is split. It does not apply to other models such as CLIP, which
    know many words of several tokens. Each word is returned once, in order.
    """
    words: dict[str, str] = {}
    for word in _WORD.findall(instruction):
        words.setdefault(word.lower(), word)
    return [
        word
        for word in words.values()
        if any(len(tokenizer.tokenize(part)) != 1 for part in _PART.findall(word))
    ]


def drop_text(prompt: Prompt, null: Prompt, dropped: Tensor) -> Prompt:
    """`prompt` with the rows where `dropped` [batch] is true replaced by `null`, an encoded "".

    SDXL's pooled embedding is replaced too; the size conditioning is not.
    """

    def mixed(kept: Tensor, empty: Tensor) -> Tensor:
        return torch.where(dropped.to(kept.device).view(-1, *(1,) * (kept.ndim - 1)), empty, kept)

    pooled = prompt.pooled
    if pooled is not None:
        assert null.pooled is not None, "both are SDXL's"
        pooled = mixed(pooled, null.pooled)
    return Prompt(mixed(prompt.hidden, null.hidden), pooled, prompt.time_ids)


def join_prompts(prompts: Sequence[Tensor | Prompt]) -> Tensor | Prompt:
    """Concatenate encoded texts along the batch."""
    tensors = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    if tensors:
        return torch.cat(tensors)
    some = [prompt for prompt in prompts if isinstance(prompt, Prompt)]

    def rows(values: list[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.cat(there) if there else None

    hidden = torch.cat([prompt.hidden for prompt in some])
    return Prompt(hidden, rows([p.pooled for p in some]), rows([p.time_ids for p in some]))


def _encode_for_sdxl(bundle: Bundle, texts: Sequence[str], size: tuple[int, int]) -> Prompt:
    first, second = bundle.text_encoder, bundle.text_encoder_2
    assert second is not None and bundle.tokenizer_2 is not None, "an SDXL bundle has two text encoders"
    one = first(_tokens(bundle.tokenizer, texts, first.device), output_hidden_states=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first tokenizer said what was cut
        tokens = _tokens(bundle.tokenizer_2, texts, second.device)
    two = second(tokens, output_hidden_states=True)
    hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).float()
    pooled = two.text_embeds.float()
    if bundle.zero_empty_text:
        empty = torch.tensor([not text for text in texts], device=hidden.device)
        hidden, pooled = hidden.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    numbers = _time_ids(bundle.unet, pooled.shape[-1], size).to(hidden.device)
    return Prompt(hidden, pooled, numbers.repeat(len(texts), 1))


def _time_ids(unet: Any, projected: int, size: tuple[int, int]) -> Tensor:
    width, height = size
    # Trained so: the size before and after cropping, and a crop at the top left corner.
    numbers = [height, width, 0, 0, height, width]
    takes = (unet.add_embedding.linear_1.in_features - projected) / unet.config.addition_time_embed_dim
    if takes != len(numbers):
        raise ModelError(
            f"This SDXL UNet takes {takes:g} numbers beside the text; the editors known have {len(numbers)}. "
            "A refiner is not an editor: use the base's UNet."
        )
    return torch.tensor([numbers], dtype=torch.float32)


def words_without_effect(bundle: Bundle, text: str) -> list[str]:
    """Warnings for the parts of a text that have no effect: truncated text and unknown words."""
    found = _cut_text(bundle.tokenizer, text)
    unknown = []
    if bundle.card.closed_vocabulary:
        unknown = unknown_words(text, bundle.tokenizer)
    if unknown:
        words = f"{bundle.card.name} does not know these words: {', '.join(unknown)}."
        warnings.warn(words, stacklevel=2)
        found.append(words)
    return found


def _cut_text(tokenizer: Any, text: str) -> list[str]:
    """A warning that quotes the text beyond the last token, if any."""
    limit = tokenizer.model_max_length
    whole = tokenizer(text, return_offsets_mapping=True, verbose=False)
    if len(whole["input_ids"]) <= limit:
        return []
    # The last position is for the end token.
    cut = text[whole["offset_mapping"][limit - 1][0] :].strip()
    return [f"The text is longer than {limit} tokens; this part has no effect: {cut!r}"]


def _tokens(tokenizer: Any, texts: Sequence[str], device: torch.device) -> Tensor:
    """Token ids [batch, limit]. Warns about truncated text."""
    limit = tokenizer.model_max_length
    for text in texts:
        for words in _cut_text(tokenizer, text):
            warnings.warn(words, stacklevel=1)
    padded = tokenizer(
        list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    return padded["input_ids"].to(device)
