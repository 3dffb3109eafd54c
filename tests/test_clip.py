from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip

from ip2p.base.errors import ModelError
from ip2p.models.clip import MEAN, STD, Clip, similarities


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return Clip.load(folder)


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_embeddings_have_unit_length(clip, pictures):
    for embedding in (clip.images(pictures), clip.texts(["a cat", "make it night"])):
        assert embedding.shape == (2, 16)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))


def test_picture_preprocessing_matches_the_papers_code(clip, pictures):
    square = F.interpolate(pictures, (32, 32), mode="bicubic", align_corners=False)
    ready = (square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = clip.model(
            pixel_values=ready,
            input_ids=torch.tensor([[clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id]]),
        ).image_embeds
    torch.testing.assert_close(clip.images(pictures), expected)


def test_text_embeddings_match_the_full_transformers_model(clip):
    tokens = clip.tokenizer(["a cat"], return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**tokens, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    torch.testing.assert_close(clip.texts(["a cat"]), expected)
    # Padding beside a longer text changes nothing.
    torch.testing.assert_close(clip.texts(["a cat", "a cat on a very long red boat"])[:1], expected)


def test_text_beyond_the_token_limit_is_truncated(clip):
    assert clip.texts(["night " * 200]).shape == (1, 16)


@pytest.mark.parametrize("off", [lambda x: 2 * x - 1, lambda x: 255 * x])
def test_pictures_outside_0_to_1_are_refused(clip, pictures, off):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        clip.images(off(pictures))


def test_the_four_similarities_match_their_formulas(clip, pictures):
    texts = ["a cat", "a dog"], ["a cat at night", "a dog at night"]
    found = clip.similarities(pictures, pictures.flip(-1), *texts)
    one, two = clip.images(pictures), clip.images(pictures.flip(-1))
    before, after = (clip.texts(each) for each in texts)
    torch.testing.assert_close(found.image_image, (one * two).sum(-1))
    torch.testing.assert_close(found.text_image_before, (one * before).sum(-1))
    torch.testing.assert_close(found.text_image_after, (two * after).sum(-1))
    picture_change, text_change = two - one, after - before
    torch.testing.assert_close(
        found.directional,
        (picture_change * text_change).sum(-1) / (picture_change.norm(dim=-1) * text_change.norm(dim=-1)),
    )


def test_directional_similarity_is_one_along_the_text_change_and_minus_one_against_it():
    start, step = torch.randn(2, 1, 16).unbind()
    torch.testing.assert_close(
        similarities(start, start + step, start, start + 2 * step).directional, torch.ones(1)
    )
    torch.testing.assert_close(
        similarities(start, start - step, start, start + step).directional, -torch.ones(1)
    )


def test_the_tokenizer_may_be_in_a_sibling_folder(folder, tmp_path):
    import shutil

    inner = shutil.copytree(folder, tmp_path / "model" / "clip")
    (tmp_path / "model" / "tokenizer").mkdir()
    for path in inner.glob("tokenizer*"):
        path.rename(tmp_path / "model" / "tokenizer" / path.name)
    assert Clip.load(inner).texts(["a cat"]).shape == (1, 16)


def test_a_folder_without_a_clip_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Clip.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot be read"):
        Clip.load(tmp_path)
