import warnings

import pytest
import torch

from ip2p.models.bundle import load_bundle
from ip2p.models.text import (
    Prompt,
    drop_text,
    encode_prompt,
    encode_prompts,
    join_prompts,
    unknown_words,
)


@pytest.fixture(scope="module")
def bundle(xl_dir):
    return load_bundle(xl_dir)


def test_sdxl_text_beyond_the_token_limit_is_truncated_with_one_warning(bundle):
    longest = "night " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = encode_prompt(bundle, longest, (64, 32))
    with pytest.warns(UserWarning, match="77 tokens; this part has no effect: 'make it SNOW'") as caught:
        cut = encode_prompt(bundle, longest + "make it SNOW", (64, 32))
    assert len(caught) == 1
    assert torch.equal(kept.hidden, cut.hidden) and torch.equal(kept.pooled, cut.pooled)


def test_sdxl_size_conditioning_is_exact(bundle):
    # 2056 is not a bf16 number.
    assert encode_prompt(bundle, "night", (2056, 1032)).time_ids.tolist() == [[1032, 2056, 0, 0, 1032, 2056]]


def test_prompts_are_joined_along_the_batch(bundle):
    texts = [encode_prompt(bundle, words, (64, 32)) for words in ("night", "snow", "")]
    joined = join_prompts(texts)
    assert joined.hidden.shape == (3, 77, 128)
    for name in ("hidden", "pooled", "time_ids"):
        for row, text in zip(getattr(joined, name), texts, strict=True):
            assert torch.equal(row[None], getattr(text, name)), name
    assert (joined.hidden[2] == 0).all() and (joined.pooled[2] == 0).all()
    plain = join_prompts([Prompt(torch.zeros(1, 2, 3)), Prompt(torch.ones(1, 2, 3))])
    assert plain.hidden[:, 0, 0].tolist() == [0, 1] and plain.pooled is None and plain.time_ids is None
    assert join_prompts([torch.zeros(1, 2, 3), torch.ones(1, 2, 3)]).shape == (2, 2, 3)


@pytest.mark.parametrize("name", ["tiny_model_dir", "sd2_dir", "xl_dir"])
def test_a_batch_of_texts_is_encoded_like_each_text_alone(request, name):
    bundle = load_bundle(request.getfixturevalue(name))
    texts = ["make it night", "", "snow", "make it night " * 30]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the truncated text
        together = encode_prompts(bundle, texts, (64, 32))
        alone = join_prompts([encode_prompt(bundle, text, (64, 32)) for text in texts])
    for part in ("hidden", "pooled", "time_ids"):
        one, other = getattr(together, part), getattr(alone, part)
        assert (one is None) == (other is None) == (part != "hidden" and bundle.kind == "sd")
        if one is not None:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["tiny_model_dir", "xl_dir"])
def test_a_dropped_text_equals_the_empty_one_including_sdxls_pooled_embedding(request, name):
    bundle = load_bundle(request.getfixturevalue(name))
    prompt = encode_prompts(bundle, ["night", "snow", "rain"], (64, 32))
    null = encode_prompt(bundle, "", (64, 32))
    mixed = drop_text(prompt, null, torch.tensor([False, True, False]))
    for part in ("hidden", "pooled") if bundle.kind == "sdxl" else ("hidden",):
        kept, empty, one = (getattr(p, part) for p in (prompt, null, mixed))
        assert torch.equal(one[[0, 2]], kept[[0, 2]]) and torch.equal(one[1], empty[0])
        assert not torch.equal(kept[1], empty[0])
    assert mixed.time_ids is prompt.time_ids


@pytest.fixture(scope="module")
def closed_tokenizer():
    """A CLIP tokenizer built like the storybook's; ten words and endings are one token each."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in ("make", "it", "let", "don", "the", "cat", "huge", "3", "'s", "'t"):
        piece, *rest = [*word[:-1], word[-1] + "</w>"]
        for letter in rest:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
                tokens.append(piece + letter)
            piece += letter
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.mark.parametrize(
    ("instruction", "unknown"),
    [
        ("Make the cat HUGE!", []),
        ("", []),
        ("let's make the cat's 3 ... don't?", []),
        ("make the Walrus juggle, walrus", ["Walrus", "juggle"]),
        ("make the caat huge", ["caat"]),
        ("the cat, the cats; the cat_cat", ["cats"]),
        ("it can't", ["can't"]),
        ("make 3 of 34", ["of", "34"]),
        ("make the café 猫 huge", ["café", "猫"]),
        ("don\u2019t", ["don\u2019t"]),
        ("make it <|endoftext|>", ["endoftext"]),
    ],
)
def test_words_missing_from_a_closed_vocabulary_are_listed_once_as_typed(
    closed_tokenizer, instruction, unknown
):
    assert unknown_words(instruction, closed_tokenizer) == unknown


def test_the_storybook_tokenizer_knows_every_word_of_its_instructions(tmp_path):
    from transformers import CLIPTokenizer

    from ip2p.training.storybook.text import write_tokenizer
    from ip2p_storybook.edits import sample_edit
    from ip2p_storybook.scene import rng_for

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for split in ("test", "unseen_phrasings"):
        for k in range(300):
            instruction = sample_edit(rng_for(split, k), split=split).instruction
            assert unknown_words(instruction, tokenizer) == [], instruction
    assert unknown_words("make the walrus juggle", tokenizer) == ["walrus", "juggle"]


def test_an_edit_warns_about_words_that_the_bundled_model_does_not_know():
    from ip2p import Editor
    from ip2p_storybook.draw import draw
    from ip2p_storybook.scene import rng_for, sample_scene

    page = draw(sample_scene(rng_for("page")), 64)
    editor = Editor.load("storybook", device="cpu")
    expected = "storybook does not know these words: gargantuan."
    with pytest.warns(UserWarning, match=expected):
        [result] = editor.edit(page, "make the cat gargantuan", steps=1)
    assert expected in result.info["warnings"]
