"""Prompt-to-Prompt: pictures of the same noise and two texts share attention maps (Hertz et al. 2022).

Each row of a batch is a picture, and a row may use the attention map of another row, its source. No map is
ever materialized. A map is softmax(q kᵀ), so a row that takes another row's map takes its queries and keys
and keeps its own values. A change to the map's columns (the words, in cross-attention) is applied to the
values instead: (M A) v = M (A v).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ip2p.base.errors import ModelError

# Features of attention layers that `SharedAttention` does not implement.
_OTHERS = (
    *("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim"),
    *("residual_connection", "fused_projections"),
)
Heads = Float[Tensor, "batch heads tokens features"]


@dataclass(frozen=True)
class WordSharing:
    """How rows mix their cross-attention with that of other rows: M[source] · moved + M[row] · kept.

    rows, sources: positions in the batch. moved: maps the source's words to the row's words. kept: the weight
    of each word's own map.
    """

    rows: Int[Tensor, "edits"]
    sources: Int[Tensor, "edits"]
    moved: Float[Tensor, "edits words words"]
    kept: Float[Tensor, "edits words"]


@dataclass(frozen=True)
class Sharing:
    """What the rows of one network call share.

    maps: for each row, the row whose self-attention map it uses (its own index for its own map); None: no
    sharing. words: cross-attention sharing; None: no sharing.
    words: cross-attention; None: each its own.
    """

    maps: Int[Tensor, "batch"] | None = None
    words: WordSharing | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a UNet prepared by `share_attention`."""
        return {"cross_attention_kwargs": {"sharing": self}}


def self_attention(
    query: Heads, key: Heads, value: Heads, maps: Int[Tensor, "batch"], scale: float | None = None
) -> Heads:
    """Attention where row b uses the map of row maps[b] and its own values (the paper's code)."""
    return F.scaled_dot_product_attention(query[maps], key[maps], value, scale=scale)


def cross_attention(
    query: Heads, key: Heads, value: Heads, words: WordSharing, scale: float | None = None
) -> Heads:
    """Cross-attention where some rows mix their maps with those of others (Hertz et al., section 3)."""
    rows, sources = words.rows, words.sources
    # For these rows: out = M[source] (moved v) + M[row] (kept v).
    moved = words.moved.to(value)[:, None] @ value[rows]
    taken = F.scaled_dot_product_attention(query[sources], key[sources], moved, scale=scale)
    weights = torch.ones_like(value[:, :1, :, :1]).index_copy(0, rows, words.kept.to(value)[:, None, :, None])
    own = F.scaled_dot_product_attention(query, key, value * weights, scale=scale)
    return own.index_add(0, rows, taken)


class SharedAttention:
    """A diffusers attention processor; each UNet call passes what its rows share.

    Without sharing, its output is bit-identical to the default processor of diffusers.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch pixels features"],
        encoder_hidden_states: Float[Tensor, "batch words text_features"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        sharing: Sharing | None = None,
    ) -> Float[Tensor, "batch pixels features"]:
        assert attention_mask is None, "attention masks are not supported"
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen))
        )
        sharing = sharing or Sharing()
        if encoder_hidden_states is None and sharing.maps is not None:
            out = self_attention(query, key, value, sharing.maps, attn.scale)
        elif encoder_hidden_states is not None and sharing.words is not None:
            out = cross_attention(query, key, value, sharing.words, attn.scale)
        else:
            out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


def share_attention(unet: Any) -> None:
    """Replace the attention processors of a Stable Diffusion UNet in place; its output does not change.

    Raises ModelError for attention other than that of SD 1.x, SD 2.x, SDXL and the storybook model.
    """
    from diffusers.models.attention_processor import Attention

    for name, layer in unet.named_modules():
        if isinstance(layer, Attention) and any(getattr(layer, part, None) for part in _OTHERS):
            raise ModelError(
                f"Prompt-to-Prompt does not support the attention layer {name} of this UNet. Use a model "
                "with the architecture of SD 1.x, SD 2.x or SDXL."
            )
    unet.set_attn_processor(SharedAttention())


# --- which steps share ------------------------------------------------------------------------------


def shares(p: Float[Tensor, "edits"], step: int, steps: int) -> Bool[Tensor, "edits"]:
    """Whether attention is shared in step 0 … steps - 1: in the first fraction p of the steps (paper's code).

    Shared while p > step / (steps - 1), so p = 1 excludes the last step.
    """
    return p > step / max(steps - 1, 1)


# --- word alignment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Maps the tokens of an edited caption to those of its source; `moved` and `kept` as in `WordSharing`."""

    moved: Float[Tensor, "words words"]
    kept: Float[Tensor, "words"]


def refinement(tokenizer: Any, source: str, edited: str) -> Alignment:
    """Common tokens use the source's maps; new tokens keep their own.

    The tokens are aligned by a longest common subsequence, as in Hertz et al.
    """
    before, _ = _read(tokenizer, source)
    after, _ = _read(tokenizer, edited)
    return _aligned(tokenizer, before, after, [([i], [j]) for i, j in _common(before, after)])


def replacement(tokenizer: Any, source: str, edited: str) -> Alignment | None:
    """Each word uses the map of the source word at its position; None if the word counts differ.

    If two words have different numbers of tokens, the old word's maps are shared evenly among the new word's
    tokens. The words after it stay aligned; in the code of Hertz et al. they are misaligned.
    """
    before, words_before = _read(tokenizer, source)
    after, words_after = _read(tokenizer, edited)
    if len(source.split()) != len(edited.split()):
        return None
    pairs = [([0], [0]), ([len(before) - 1], [len(after) - 1])]  # begin and end
    for old, new in zip(words_before, words_after, strict=True):
        if len(old) == len(new):
            pairs += [([i], [j]) for i, j in zip(old, new, strict=True)]
        elif old and new:
            pairs.append((old, new))
    return _aligned(tokenizer, before, after, pairs)


def _aligned(
    tokenizer: Any, before: list[int], after: list[int], pairs: Sequence[tuple[list[int], list[int]]]
) -> Alignment:
    limit = tokenizer.model_max_length
    # Padding tokens are paired in order: the UNet attends to them as to words.
    padding = range(limit - max(len(before), len(after)))
    pairs = [*pairs, *(([len(before) + n], [len(after) + n]) for n in padding)]
    moved, kept = torch.zeros(limit, limit), torch.ones(limit)
    for old, new in pairs:
        kept[new] = 0
        for i in old:
            moved[i, new] = 1 / len(new)
    return Alignment(moved, kept)


def _read(tokenizer: Any, text: str) -> tuple[list[int], list[list[int]]]:
    """The truncated token ids of a text with start and end tokens, and each word's token positions."""
    read = tokenizer(
        text, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
    )
    starts = [start for start, _ in read["offset_mapping"]]
    inner = range(1, len(starts) - 1)
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    return list(read["input_ids"]), [[n for n in inner if low <= starts[n] < high] for low, high in spans]


def _common(before: list[int], after: list[int]) -> list[tuple[int, int]]:
    """The positions of a longest common subsequence; of several, the earliest in `after`."""
    best = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i, old in enumerate(before):
        for j, new in enumerate(after):
            best[i + 1][j + 1] = best[i][j] + 1 if old == new else max(best[i][j + 1], best[i + 1][j])
    pairs = []
    i, j = len(before), len(after)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
