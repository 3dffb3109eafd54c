"""Prompt-to-Prompt: pictures of the same noise and two texts share attention maps (Hertz et al. 2022).

Each row of a batch is a picture, and a row may use the attention map of another row, its source. To share
maps, none is materialized. A map is softmax(q kᵀ), so a row that takes another row's map takes its queries
and keys and keeps its own values. A change to the map's columns (the words, in cross-attention) is applied to
the values instead: (M A) v = M (A v). Only local blend builds maps, those of one small size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    rows: Int[Tensor, " edits"]
    sources: Int[Tensor, " edits"]
    moved: Float[Tensor, "edits words words"]
    kept: Float[Tensor, "edits words"]


@dataclass(frozen=True)
class Sharing:
    """What the rows of one network call share.

    maps: for each row, the row whose self-attention map it uses (its own index for its own map); None: no
    sharing. words: cross-attention sharing; None: no sharing. seen: collects cross-attention maps.
    """

    maps: Int[Tensor, " batch"] | None = None
    words: WordSharing | None = None
    seen: WordMaps | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a UNet prepared by `share_attention`."""
        return {"cross_attention_kwargs": {"sharing": self}}


def self_attention(
    query: Heads, key: Heads, value: Heads, maps: Int[Tensor, " batch"], scale: float | None = None
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


def cross_maps(
    query: Heads, key: Heads, words: WordSharing | None, scale: float | None = None
) -> Float[Tensor, "batch heads pixels words"]:
    """The maps that `cross_attention` uses, built in full."""
    maps = (query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1)
    if words is None:
        return maps
    moved, kept = words.moved.to(maps)[:, None], words.kept.to(maps)[:, None, None]
    return maps.index_copy(0, words.rows, maps[words.sources] @ moved + maps[words.rows] * kept)


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
        if encoder_hidden_states is not None and sharing.seen is not None:
            sharing.seen.add(query, key, sharing.words, attn.scale)
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


def shares(p: Float[Tensor, " edits"], step: int, steps: int) -> Bool[Tensor, " edits"]:
    """Whether attention is shared in step 0 … steps - 1: in the first fraction p of the steps (paper's code).

    Shared while p > step / (steps - 1), so p = 1 excludes the last step.
    """
    return p > step / max(steps - 1, 1)


# --- local blend ------------------------------------------------------------------------------------


class WordMaps:
    """Sums the cross-attention maps of chosen words over layers, heads and steps (Hertz et al., section 3.2).

    words: the chosen tokens of each row. side: (height, width) of the maps that are taken; the published code
    takes those at a quarter of the latents' sides. rows: the rows of the current network call that have a
    text; they come first in the call.
    """

    def __init__(self, words: Bool[Tensor, "rows words"], side: tuple[int, int]) -> None:
        self.words, self.side = words.float(), side
        self.sums = torch.zeros(len(words), side[0] * side[1], device=words.device)
        self.rows = torch.arange(len(words), device=words.device)

    def add(self, query: Heads, key: Heads, words: WordSharing | None, scale: float | None) -> None:
        """Add a layer's maps, as they are after sharing, if they have the right size."""
        if query.shape[2] == self.sums.shape[1]:
            maps = cross_maps(query, key, words, scale)[: len(self.rows)].float()
            chosen = torch.einsum("bhpw,bw->bp", maps, self.words[self.rows])
            self.sums.index_add_(0, self.rows, chosen)

    def region(self, size: tuple[int, int], threshold: float) -> Float[Tensor, "rows 1 height width"]:
        """1 where a row's words are: B(max-pooled mean map / its maximum > threshold); 0 elsewhere."""
        maps = F.max_pool2d(self.sums.view(-1, 1, *self.side), 3, stride=1, padding=1)
        maps = F.interpolate(maps, size=size)  # nearest, as in the published code
        highest = maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        return (maps / highest > threshold).float()


def blend_latents(
    before: Float[Tensor, "edits channels height width"],
    after: Float[Tensor, "edits channels height width"],
    mask: Float[Tensor, "edits 1 height width"],
) -> Float[Tensor, "edits channels height width"]:
    """(1 - mask) · before + mask · after: outside the mask, the edit is its source (Hertz et al.)."""
    return before + mask * (after - before)


# --- word alignment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Maps the tokens of an edited caption to those of its source; `moved` and `kept` as in `WordSharing`."""

    moved: Float[Tensor, "words words"]
    kept: Float[Tensor, " words"]

    def weighted(self, tokens: Bool[Tensor, " words"], weight: float) -> Alignment:
        """The same with the maps of some tokens multiplied by a weight (attention reweighting)."""
        scale = torch.where(tokens, weight, 1.0)
        return replace(self, moved=self.moved * scale, kept=self.kept * scale)


def changed_tokens(
    tokenizer: Any, source: str, edited: str
) -> tuple[Bool[Tensor, " words"], Bool[Tensor, " words"]]:
    """The tokens of the words that the other caption lacks: of the source, and of the edited caption."""
    plain = [[word.casefold().strip(".,;:!?") for word in text.split()] for text in (source, edited)]
    common = _common(*plain)
    found = []
    for side, text in enumerate((source, edited)):
        _, places = _read(tokenizer, text)
        new = set(range(len(places))) - {pair[side] for pair in common}
        tokens = torch.zeros(tokenizer.model_max_length, dtype=torch.bool)
        tokens[[token for word in new for token in places[word]]] = True
        found.append(tokens)
    return found[0], found[1]


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


def _common(before: Sequence[object], after: Sequence[object]) -> list[tuple[int, int]]:
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
