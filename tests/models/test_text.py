import warnings

import pytest
import torch

from ip2p.models.bundle import load_bundle
from ip2p.models.text import Prompt, encode_prompt, join_prompts


@pytest.fixture(scope="module")
def bundle(xl_dir):
    return load_bundle(xl_dir)


def test_sdxl_text_beyond_the_tokens_is_named_once_and_cut(bundle):
    fits = "night " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = encode_prompt(bundle, fits, (64, 32))
    with pytest.warns(UserWarning, match="77 tokens; this part has no effect: 'make it SNOW'") as said:
        cut = encode_prompt(bundle, fits + "make it SNOW", (64, 32))
    assert len(said) == 1
    assert torch.equal(kept.hidden, cut.hidden) and torch.equal(kept.pooled, cut.pooled)


def test_sizes_stay_exact_in_half_precision(bundle):
    # 2056 is no bf16 number.
    assert encode_prompt(bundle, "night", (2056, 1032)).time_ids.tolist() == [[1032, 2056, 0, 0, 1032, 2056]]


def test_texts_join_as_rows(bundle):
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
