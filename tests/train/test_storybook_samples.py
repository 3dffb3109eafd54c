"""Groups of edited pages, their shards on disk, and the batches drawn from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ip2p.training.objective import Objective
from ip2p.training.storybook.autoencoder import new_autoencoder
from ip2p.training.storybook.data import Shards, World, changed_cells, draw_group, draw_planes
from ip2p.training.storybook.presets import PRESETS, PoolConfig, kind_shares
from ip2p.training.storybook.samples import FULL_NOISE, EditorSamples, LatentShards, Pool
from ip2p_storybook.cells import cell_map, thing_map
from ip2p_storybook.edits import EDIT_KINDS
from ip2p_storybook.rewording import same_page

WORLD = World(size=64, cells=8, seed=4, groups=3, edits=4, wordings=2)


def count_words(texts):
    """A fake tokenizer: the length of the text, eight times."""
    return torch.tensor([[len(text)] * 8 for text in texts])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return new_autoencoder(PRESETS["smoke"]).eval().requires_grad_(False)


def test_every_pair_of_a_group_is_an_edit_between_its_two_pages():
    kinds = {"forward": 0, "back": 0, "across": 0}
    for number in range(6):
        scenes, pairs = draw_group(WORLD, number)
        assert len(scenes) == WORLD.edits + 1 and len({s.seed for s in scenes}) == 1
        assert not scenes[0].seed % 2  # a page for training
        for pair in pairs:
            kinds["forward" if pair.before == 0 else "back" if pair.after == 0 else "across"] += 1
            for edit in pair.edits:
                assert edit.before == scenes[pair.before]
                assert same_page(edit.after, scenes[pair.after])
    assert kinds["forward"] == 6 * WORLD.edits
    assert kinds["back"] > 12 and kinds["across"] > 12


def test_shards_match_pages_and_labels_computed_from_the_scenes():
    """Oracle: pages and labels computed from the scenes."""
    shard = Shards(replace(WORLD, loose=0.0), [1], count_words).make(1)
    scenes, pairs = [], []
    for group in range(3, 6):
        first = len(scenes)
        group_scenes, group_pairs = draw_group(WORLD, group)
        scenes += group_scenes
        pairs += [replace(pair, before=pair.before + first, after=pair.after + first) for pair in group_pairs]
    assert len(shard["pixels"]) == len(scenes) == WORLD.pages
    for row, scene in enumerate(scenes):
        np.testing.assert_array_equal(shard["pixels"][row], draw_planes(scene, 64))
        np.testing.assert_array_equal(shard["cells"][row], cell_map(thing_map(scene, 64), 8))
    assert shard["before"].tolist() == [pair.before for pair in pairs]
    assert shard["after"].tolist() == [pair.after for pair in pairs]
    for row, pair in enumerate(pairs):
        before, after = (draw_planes(scenes[k], 64) for k in (pair.before, pair.after))
        expected = [
            [bool((before != after)[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any()) for x in range(8)]
            for y in range(8)
        ]
        assert shard["changed"][row].tolist() == expected == changed_cells(before, after, 8).tolist()
        assert shard["kind"][row] == EDIT_KINDS.index(pair.edits[0].kind)
        assert shard["words"][row, 0, 0] == len(pair.edits[0].instruction)


def test_a_share_of_the_instructions_has_loose_grammar():
    exact, half, all_loose = (
        Shards(replace(WORLD, loose=share), [1], count_words).make(1)["words"][..., 0]
        for share in (0.0, 0.5, 1.0)
    )
    assert WORLD.loose == 0.5
    assert 0.2 < (half != exact).float().mean() < 0.55 < (all_loose != exact).float().mean()


def test_shards_are_written_once_and_separately_for_each_autoencoder(vae, tmp_path):
    shards = LatentShards(WORLD, tmp_path, vae, count_words, workers=0)
    shards.make([0, 2], then=[1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(times) == 2
    again = LatentShards(WORLD, tmp_path, vae, count_words, workers=0)
    again.make([2, 1, 0], then=[])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    direct = LatentShards(WORLD, tmp_path / "other", vae, count_words, workers=0)
    direct.make([1], then=[])
    for key, value in direct.read(1).items():
        assert torch.equal(value, again.read(1)[key]), key
    torch.manual_seed(9)
    other = LatentShards(WORLD, tmp_path, new_autoencoder(PRESETS["smoke"]).eval(), count_words, workers=0)
    assert not other.path(0).exists()


def test_latents_are_the_modes_in_half_precision(vae, tmp_path):
    shards = LatentShards(WORLD, tmp_path, vae, count_words, workers=0)
    shards.make([0], then=[])
    pixels = Shards(WORLD, [0], count_words).make(0)["pixels"]
    with torch.no_grad():
        modes = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()
    latents = shards.read(0)["latents"]
    assert latents.dtype == torch.float16
    torch.testing.assert_close(latents.float(), modes, atol=5e-3, rtol=2e-3)


def samples_of(vae, folder, *, objective=None, full_noise=False, batch=4, before=0):
    return EditorSamples(
        LatentShards(WORLD, folder, vae, count_words, workers=0),
        PoolConfig(fresh=1, pool=2, reuse=2, shards=3),
        objective or Objective(caption_share=0.2),
        batch=batch,
        seed=1,
        device=torch.device("cpu"),
        full_noise=full_noise,
        weight=lambda step: 1.0 / (step + 1),
        steps_before=before,
    )


def test_a_resumed_run_gets_the_same_batches(vae, tmp_path):
    samples = samples_of(vae, tmp_path)
    steps = samples.steps_per_block + 2
    uninterrupted = [batch for (batch,), _ in zip(samples(0), range(steps), strict=False)]
    for start in (1, steps - 1):
        (batch,) = next(iter(samples_of(vae, tmp_path)(start)))
        assert torch.equal(batch.before, uninterrupted[start].before) and torch.equal(
            batch.text, uninterrupted[start].text
        )
        assert torch.equal(batch.draws.noise, uninterrupted[start].draws.noise)
        assert torch.equal(batch.labels["after_cells"], uninterrupted[start].labels["after_cells"])
    assert [float(batch.labels["weight"]) for batch in uninterrupted[:2]] == [1.0, 0.5]


def test_blocks_use_new_shards_first_and_old_ones_once_all_are_used(vae, tmp_path):
    samples = samples_of(vae, tmp_path)
    assert samples.numbers(0) == [0]
    assert samples.numbers(1) == [1, 0]
    assert samples.numbers(2)[0] == 2 and samples.numbers(2)[1] in (0, 1)
    assert sorted(samples.numbers(7)) != [] and set(samples.numbers(7)) <= {0, 1, 2}
    # A stage that follows another starts with unused shards.
    assert samples_of(vae, tmp_path, before=2 * samples.steps_per_block).numbers(0)[0] == 2


def test_conditions_determine_the_text_and_full_noise_sets_the_timestep(vae, tmp_path):
    samples = samples_of(vae, tmp_path, full_noise=True, batch=64)
    (batch,) = next(iter(samples(0)))
    draws = batch.draws
    assert (draws.timesteps == FULL_NOISE).all()
    nothing = count_words([""])[0]
    null = draws.text_null & ~draws.caption_only
    assert null.any() and draws.caption_only.any()
    assert (batch.text[null] == nothing).all() and (batch.text[~null] > 0).all()
    assert draws.image_null[draws.caption_only].all()
    # A caption is longer than an instruction.
    assert (
        batch.text[draws.caption_only].float().mean()
        > batch.text[~(null | draws.caption_only)].float().mean()
    )


def test_each_kind_of_edit_has_its_share_of_the_weights(vae, tmp_path):
    shards = LatentShards(WORLD, tmp_path, vae, count_words, workers=0)
    shards.make([0, 1], then=[])
    pool = Pool([shards.read(0), shards.read(1)], torch.device("cpu"))
    shares = kind_shares({"add": 3.0})
    weights = pool.weights(shares)
    kinds_present = {EDIT_KINDS[k] for k in pool.pairs["kind"].tolist()}
    for kind in kinds_present:
        total = weights[pool.pairs["kind"] == EDIT_KINDS.index(kind)].sum()
        assert float(total) == pytest.approx(shares[kind], rel=1e-5)
    assert shares["add"] == pytest.approx(3 * kind_shares({})["add"])
    # Pages of a later shard are offset by their position in the pool.
    assert pool.before.max() >= WORLD.pages and pool.after.max() < 2 * WORLD.pages
