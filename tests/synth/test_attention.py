"""Prompt-to-Prompt's attention, compared with explicit attention maps."""

import random

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ip2p.base.errors import ModelError
from ip2p.models.bundle import load_bundle
from ip2p.models.text import encode_prompts
from ip2p.synth import attention
from ip2p.synth.attention import Sharing, WordSharing, refinement, replacement, share_attention, shares

PAIRS = [
    ("a cat at night", "a dog at night"),
    ("a cat at night", "a painting of a cat at night"),
    ("make a small red cat at night", "make a cat"),
    ("night after night a cat", "a cat at night after a night"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_editor):
    return tiny_editor.bundle.tokenizer


def random_heads(*sizes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


class TestMaps:
    """In fp64, results with and without explicit maps differ only by rounding."""

    def test_a_row_with_shared_self_attention_uses_the_other_rows_map(self):
        query, key, value = random_heads((4, 2, 9, 8), (4, 2, 9, 8), (4, 2, 9, 8))
        rows = torch.tensor([0, 0, 2, 2])
        maps = (query @ key.mT / 8**0.5).softmax(dim=-1)
        torch.testing.assert_close(attention.self_attention(query, key, value, rows), maps[rows] @ value)

    def test_cross_attention_mixes_the_sources_map_with_the_rows_own(self):
        query, key, value = random_heads((3, 2, 9, 8), (3, 2, 5, 8), (3, 2, 5, 8))
        moved, kept = random_heads((2, 5, 5), (2, 5), seed=1)
        words = WordSharing(torch.tensor([2, 1]), torch.tensor([0, 0]), moved, kept)
        maps = (query @ key.mT / 8**0.5).softmax(dim=-1)
        expected = maps.clone()
        for row, move, keep in zip((2, 1), moved, kept, strict=True):
            expected[row] = maps[0] @ move + maps[row] * keep
        torch.testing.assert_close(attention.cross_attention(query, key, value, words), expected @ value)


class PaperEquations:
    """Hertz et al. on explicit maps, pixel by pixel and word by word, from the paper.

    Maps are nested lists [pixels][words]. Section 3.2: word swap takes M of the source's word; refinement
    (Edit)_ij = M*_ij where A(j) is none, else M_iA(j); re-weighting scales column j* by c; local blend keeps
    the pixels where B(M(w)) ∪ B(M*(w*)), with B(x) = x > k after the code's max pooling.
    """

    @staticmethod
    def edit(target, source, align, weights):
        words = range(len(target[0]))
        new = [
            [target[i][j] if align[j] is None else source[i][align[j]] for j in words]
            for i in range(len(target))
        ]
        return [[new[i][j] * weights[j] for j in words] for i in range(len(target))]

    @staticmethod
    def binary(layers, words, side, size, threshold):
        """B of the mean map of some words; layers: maps of every layer and head of a row."""
        mean = [sum(maps[i][j] for maps in layers for j in words) / len(layers) for i in range(side * side)]

        def pooled(y, x):
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            return max(mean[b * side + a] for b, a in near if 0 <= a < side and 0 <= b < side)

        grid = [[pooled(y * side // size, x * side // size) for x in range(size)] for y in range(size)]
        highest = max(map(max, grid))
        return [[value / highest > threshold for value in line] for line in grid]


def explicit_maps(query, key):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)


@pytest.mark.parametrize("weight", [1.0, 3.0, -2.0])
def test_refined_and_reweighted_maps_equal_the_papers_equations(weight):
    query, key, value = random_heads((2, 2, 9, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    align, new = [0, 2, None, 1, None], torch.tensor([False, False, True, False, True])
    moved, kept = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for j, i in enumerate(align):
        if i is None:
            kept[j] = 1
        else:
            moved[i, j] = 1
    found = attention.Alignment(moved, kept).weighted(new, weight)
    words = WordSharing(torch.tensor([1]), torch.tensor([0]), found.moved[None], found.kept[None])
    maps = explicit_maps(query, key)
    weights = [weight if one else 1.0 for one in new.tolist()]
    edited = [
        PaperEquations.edit(target.tolist(), source.tolist(), align, weights)
        for target, source in zip(maps[1], maps[0], strict=True)
    ]
    expected = torch.stack([maps[0], torch.tensor(edited, dtype=torch.float64)])
    torch.testing.assert_close(attention.cross_maps(query, key, words), expected, atol=1e-5, rtol=0)
    out = attention.cross_attention(query, key, value, words)
    torch.testing.assert_close(out, expected @ value, atol=1e-5, rtol=1e-5)
    assert weight == 1 or (expected[1] - maps[1]).abs().max() > 0.05


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9])
def test_local_blend_keeps_the_region_of_the_papers_equations(threshold):
    side, size = 8, 16
    words = torch.tensor([[False, True, True, False, False], [False, False, False, True, False]])
    seen = attention.WordMaps(words, (side, side))
    layers = []
    shapes = (4, 2, 64, 8), (4, 2, 5, 8)  # maps of one picture resemble each other
    for layer in range(6):  # two layers at each of three steps; maps of another size are ignored
        query, key = (
            a + 0.3 * b for a, b in zip(random_heads(*shapes), random_heads(*shapes, seed=layer), strict=True)
        )
        query = query * 4  # sharp maps
        seen.add(query.float(), key.float(), None, None)
        layers.append(explicit_maps(query, key))
        small, small_key, _ = random_heads((4, 2, 9, 8), (4, 2, 5, 8), (1,), seed=layer)
        seen.add(small.float(), small_key.float(), None, None)
    region = seen.region((size, size), threshold)
    expected = []
    for row, chosen in enumerate(([1, 2], [3])):
        maps = [head.tolist() for layer in layers for head in layer[row]]
        expected.append(PaperEquations.binary(maps, chosen, side, size, threshold))
    assert region[:, 0].bool().tolist() == expected
    assert threshold < 0.5 or 0 < region.mean() < 1
    before, after = torch.randn(1, 3, size, size), torch.randn(1, 3, size, size)
    union = torch.tensor(expected[0]) | torch.tensor(expected[1])
    blended = attention.blend_latents(before, after, torch.maximum(region[:1], region[1:]))
    torch.testing.assert_close(blended, torch.where(union, after, before))


def test_maps_are_summed_only_for_the_remaining_rows():
    words = torch.eye(3, 5, dtype=torch.bool)
    query, key, _ = random_heads((4, 2, 16, 8), (4, 2, 5, 8), (1,))
    seen = attention.WordMaps(words, (4, 4))
    seen.rows = torch.tensor([0, 2])
    seen.add(query, key, None, None)
    maps = explicit_maps(query, key).sum(dim=1).float()
    torch.testing.assert_close(seen.sums[0], maps[0, :, 0])
    torch.testing.assert_close(seen.sums[2], maps[1, :, 2])
    assert not seen.sums[1].any()


def test_changed_tokens_are_those_in_only_one_of_the_captions(tokenizer):
    def texts(tokens, caption):
        ids = tokenizer(caption, padding="max_length", max_length=77)["input_ids"]
        return tokenizer.decode([id for id, yes in zip(ids, tokens.tolist(), strict=True) if yes])

    before, after = "a cat at night", "A small dog at night."
    old, new = attention.changed_tokens(tokenizer, before, after)
    assert texts(old, before).split() == ["cat"]
    assert texts(new, after).split() == ["small", "dog"]
    assert not any(each.any() for each in attention.changed_tokens(tokenizer, before, "A cat at night."))


class ExplicitAttention:
    """Attention of the released code and of Hertz et al.: every map is built, then replaced.

    The batch is source and edit with their text, then both without. `mapper` moves the
    source's map to the edit's words; `taken` is how much of it they take.
    """

    def __init__(self, *, share_self: bool = False, mapper=None, taken=None):
        self.share_self, self.mapper, self.taken = share_self, mapper, taken

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = attn.heads

        def split(states):
            batch, tokens, width = states.shape
            return states.reshape(batch, tokens, heads, width // heads).permute(0, 2, 1, 3)

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(seen)), split(attn.to_v(seen))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        if self.share_self and encoder_hidden_states is None:
            one, _, three, _ = sim.chunk(4)
            sim = torch.cat([one, one, three, three])
        maps = sim.softmax(dim=-1)
        if self.mapper is not None and encoder_hidden_states is not None:
            new = torch.einsum("hpw,wn->hpn", maps[0], self.mapper)
            maps = maps.clone()
            maps[1] = new * self.taken + maps[1] * (1 - self.taken)
        out = torch.einsum("bhij,bhjd->bhid", maps, v).permute(0, 2, 1, 3).flatten(2)
        return attn.to_out[0](out)


@pytest.fixture(params=["tiny_model_dir", "sd1_dir", "sd2_dir", "xl_dir"])
def network(request: pytest.FixtureRequest):
    """A bundle, and a function that runs its UNet on source and edit, with and without text."""
    bundle = load_bundle(request.getfixturevalue(request.param))
    generator = torch.Generator().manual_seed(0)
    channels = torch.randn(4, 8, 16, 16, generator=generator)
    prompt = encode_prompts(bundle, [*PAIRS[0], "", ""], (64, 64))
    more = {}
    if prompt.pooled is not None:
        more["added_cond_kwargs"] = {"text_embeds": prompt.pooled, "time_ids": prompt.time_ids}

    @torch.inference_mode()
    def call(sharing: Sharing | None = None):
        shared = {} if sharing is None else sharing.arguments()
        return bundle.unet(channels, 500.0, encoder_hidden_states=prompt.hidden, **more, **shared).sample

    return bundle, call


def test_attention_without_sharing_equals_diffusers_bit_for_bit(network):
    bundle, call = network
    bundle.unet.set_attn_processor(AttnProcessor2_0())
    expected = call()
    share_attention(bundle.unet)
    assert torch.equal(call(), expected)
    assert torch.equal(call(Sharing()), expected)


def test_shared_self_attention_equals_the_released_code(network):
    bundle, call = network
    bundle.unet.set_attn_processor(ExplicitAttention())
    alone = call()
    bundle.unet.set_attn_processor(ExplicitAttention(share_self=True))
    expected = call()
    share_attention(bundle.unet)
    torch.testing.assert_close(call(Sharing(torch.tensor([0, 0, 2, 2]))), expected, atol=1e-5, rtol=1e-5)
    assert (expected - alone)[1::2].abs().amin(dim=0).max() > 1e-3  # in both halves of guidance
    torch.testing.assert_close(expected[::2], alone[::2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("align", [refinement, replacement])
def test_shared_cross_attention_equals_explicit_maps(network, align):
    bundle, call = network
    bundle.unet.set_attn_processor(ExplicitAttention())
    alone = call()
    aligned = align(bundle.tokenizer, *PAIRS[0])
    bundle.unet.set_attn_processor(ExplicitAttention(mapper=aligned.moved, taken=1 - aligned.kept))
    expected = call()
    words = WordSharing(torch.tensor([1]), torch.tensor([0]), aligned.moved[None], aligned.kept[None])
    share_attention(bundle.unet)
    torch.testing.assert_close(call(Sharing(words=words)), expected, atol=1e-5, rtol=1e-5)
    assert (expected - alone)[1].abs().max() > 1e-4
    others = [0, 2, 3]
    torch.testing.assert_close(expected[others], alone[others], atol=1e-5, rtol=1e-5)


def test_an_unsupported_attention_layer_is_refused():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    with pytest.raises(ModelError, match="Prompt-to-Prompt does not support the attention layer"):
        share_attention(unet)


class TestShares:
    def test_the_first_fraction_p_of_the_steps_is_shared(self):
        p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
        steps = 100
        counts = sum(shares(p, step, steps).long() for step in range(steps))
        expected = [sum(one > i / (steps - 1) for i in range(steps)) for one in p.tolist()]
        assert counts.tolist() == expected == [0, 10, 50, 90, 99]

    def test_a_single_step_is_shared_unless_p_is_zero(self):
        assert shares(torch.tensor([0.0, 0.01, 1.0]), 0, 1).tolist() == [False, True, True]


def needleman_wunsch(before: list[int], after: list[int]) -> list[int]:
    """Hertz et al.'s alignment (gap 0, match 1, mismatch -1): per token after, its index before or -1."""
    score = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    step = {}
    for i in range(1, len(before) + 1):
        for j in range(1, len(after) + 1):
            left, up = score[i][j - 1], score[i - 1][j]
            both = score[i - 1][j - 1] + (1 if before[i - 1] == after[j - 1] else -1)
            score[i][j] = max(left, up, both)
            step[i, j] = "left" if score[i][j] == left else "up" if score[i][j] == up else "both"
    found = [-1] * len(after)
    i, j = len(before), len(after)
    while i > 0 or j > 0:
        way = step.get((i, j), "left" if i == 0 else "up")
        if way == "both":
            found[j - 1] = i - 1
        i, j = i - (way != "left"), j - (way != "up")
    return found


class TestWords:
    def test_common_tokens_equal_the_authors_alignment(self):
        rng = random.Random(0)
        for _ in range(200):
            before, after = ([0, *(rng.randint(1, 4) for _ in range(rng.randint(0, 9))), 9] for _ in "ab")
            pairs = attention._common(before, after)
            found = needleman_wunsch(before, after)
            assert pairs == [(i, j) for j, i in enumerate(found) if i >= 0], (before, after)

    @pytest.mark.parametrize("before, after", PAIRS)
    def test_refinement_moves_the_tokens_that_both_captions_have(self, tokenizer, before, after):
        aligned = refinement(tokenizer, before, after)
        old, new = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]
        found = needleman_wunsch(old, new)
        for j, i in enumerate(found):
            assert aligned.kept[j] == (i < 0)
            assert aligned.moved[:, j].nonzero().flatten().tolist() == ([i] if i >= 0 else [])

    @pytest.mark.parametrize("before, after", PAIRS)
    def test_padding_is_paired_with_padding(self, tokenizer, before, after):
        aligned = refinement(tokenizer, before, after)
        old, new = len(tokenizer(before)["input_ids"]), len(tokenizer(after)["input_ids"])
        limit = tokenizer.model_max_length
        for j in range(new, limit):
            source = old + j - new
            assert aligned.kept[j] == (source >= limit)
            assert aligned.moved[:, j].nonzero().flatten().tolist() == ([source] if source < limit else [])

    @pytest.mark.parametrize("align", [refinement, replacement])
    def test_a_caption_aligns_with_itself(self, tokenizer, align):
        aligned = align(tokenizer, "a cat at night", "a cat at night")
        assert torch.equal(aligned.moved, torch.eye(77)) and not aligned.kept.any()

    def test_a_word_takes_the_map_of_the_word_it_replaces(self, tokenizer):
        # "night" and "make" are one token each here.
        aligned = replacement(tokenizer, "night make night", "night night night")
        assert torch.equal(aligned.moved, torch.eye(77)) and not aligned.kept.any()

    def test_a_word_with_more_tokens_shares_the_map_and_later_words_stay_aligned(self, tokenizer):
        aligned = replacement(tokenizer, "night it night", "night cat night")  # 1, 1, 1 and 1, 3, 1 tokens
        assert [len(tokenizer(word)["input_ids"]) - 2 for word in ("night", "it", "cat")] == [1, 1, 3]
        expected = torch.zeros(6, 8)
        expected[0, 0] = expected[1, 1] = expected[3, 5] = expected[4, 6] = expected[5, 7] = 1
        expected[2, 2:5] = 1 / 3
        torch.testing.assert_close(aligned.moved[:6, :8], expected)
        assert not aligned.kept.any()

    def test_replacement_keeps_the_sum_of_every_map(self, tokenizer):
        aligned = replacement(tokenizer, "a cat sat at night", "a dinosaur ran at noon")
        torch.testing.assert_close(aligned.moved.sum(dim=1)[:60], torch.ones(60))

    def test_replacement_needs_equal_word_counts(self, tokenizer):
        assert replacement(tokenizer, "a cat", "a black cat") is None

    def test_captions_beyond_the_token_limit_are_truncated(self, tokenizer):
        long = "a cat at night " * 30
        for align in (refinement, replacement):
            aligned = align(tokenizer, long, long)
            assert torch.equal(aligned.moved, torch.eye(77)) and not aligned.kept.any()
