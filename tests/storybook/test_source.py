"""The storybook as a source of training data."""

import pickle

import numpy as np
import pytest

from ip2p.training.storybook.source import StorybookSource
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.labels import edit_labels, scene_labels
from ip2p_storybook.scene import rng_for


def test_each_row_is_the_edit_seeded_with_its_number():
    edit = sample_edit(rng_for("storybook pairs", 3, 5))
    pair = StorybookSource(32, seed=3)[5]
    assert np.array_equal(pair.before, draw(edit.before, 32))
    assert np.array_equal(pair.after, draw(edit.after, 32))
    assert pair.instruction == edit.instruction
    assert pair.caption and pair.edited_caption
    assert np.array_equal(pair.labels["before"], scene_labels(edit.before))
    assert np.array_equal(pair.labels["after"], scene_labels(edit.after))
    assert np.array_equal(pair.labels["edit"], edit_labels(edit))


def test_training_pages_have_even_seeds_and_other_splits_odd_ones(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ip2p.training.storybook.source.draw", lambda scene, size: drawn.append(scene.seed % 2)
    )
    for split, odd in (("train", 0), ("test", 1), ("unseen_phrasings", 1), ("unseen_combinations", 1)):
        drawn.clear()
        source = StorybookSource(32, split=split)
        for row in range(4):
            source[row]
        assert set(drawn) == {odd}


def test_a_source_without_a_count_is_endless():
    endless, three = StorybookSource(32), StorybookSource(32, count=3)
    assert endless.endless and len(endless) == 2**31
    assert not three.endless and len(three) == 3
    assert three.blocks() == [range(3)]
    assert endless[2].id == three[2].id
    with pytest.raises(IndexError):
        three[3]


def test_a_pickled_copy_gives_the_same_rows():
    source = StorybookSource(32, seed=1)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.key == source.key
    assert np.array_equal(copy[7].after, source[7].after)


def test_the_key_depends_on_size_seed_and_split():
    keys = {
        StorybookSource(32).key,
        StorybookSource(64).key,
        StorybookSource(32, seed=1).key,
        StorybookSource(32, split="test").key,
    }
    assert len(keys) == 4
