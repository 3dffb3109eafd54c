"""The order of samples, their share among processes, and their randomness."""

import numpy as np
import pytest
import torch

from ip2p.base.errors import InputError
from ip2p.data.records import BrokenRow
from ip2p.training.objective import Objective, random_draws
from ip2p.training.samples import (
    Order,
    PooledSamples,
    PromptOrder,
    Share,
    TextInput,
    ahead,
    chosen_texts,
    variant_of,
)
from ip2p.training.settings import TrainConfig
from ip2p.training.storybook.source import StorybookSource
from ip2p.training.trainer import _apart
from ip2p.training.transform import Transform


def test_every_epoch_has_each_row_once_and_its_own_order():
    order = Order(range(7), seed=3)
    epochs = [[order(e * 7 + k) for k in range(7)] for e in range(4)]
    assert all(sorted(rows) == list(range(7)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert order(3) == epochs[0][3]  # random access gives the same


def test_blocks_are_shuffled_and_their_rows_stay_near_each_other():
    blocks = [list(range(k * 10, k * 10 + 10)) for k in range(8)]
    order = Order(range(80), seed=0, blocks=blocks, window=2)
    rows = [order(k) for k in range(80)]
    assert sorted(rows) == list(range(80)) and rows != list(range(80))
    for first in range(0, 80, 20):
        assert len({row // 10 for row in rows[first : first + 20]}) == 2


def test_a_prompt_with_four_pairs_is_drawn_as_often_as_one_with_one_pair():
    order = PromptOrder([10, 11, 12, 13, 20], ["a"] * 4 + ["b"], seed=0)
    drawn = [order(place) for place in range(4000)]
    assert all(20 in drawn[k : k + 2] for k in range(0, 4000, 2))  # each prompt once an epoch
    shares = [drawn.count(row) / 4000 for row in (10, 11, 12, 13, 20)]
    assert shares[4] == 0.5 and np.allclose(shares[:4], 0.125, atol=0.02)
    assert drawn[7] == order(7)


def test_held_out_pairs_share_no_prompt_with_training_pairs():
    prompts = [f"prompt {k // 4}" for k in range(400)]
    held, kept = _apart(TrainConfig(held_out=8), prompts)
    assert len(held) == 8 and len({prompts[k] for k in held}) == 8
    assert not {prompts[k] for k in held} & {prompts[k] for k in kept}
    assert len(kept) == 400 - 8 * 4


def test_no_rows_is_an_error_that_names_the_check():
    with pytest.raises(InputError, match="ip2p data check"):
        Order([], seed=0)


@pytest.mark.parametrize(("micro", "world"), [(8, 1), (2, 1), (4, 2), (1, 8), (2, 4)])
def test_the_shares_of_all_processes_make_up_the_batch(micro, world):
    shares = [Share(batch=8, micro=micro, rank=rank, world=world) for rank in range(world)]
    for step in (0, 5):
        places = [p for share in shares for micro_places in share.places(step) for p in micro_places]
        assert sorted(places) == list(range(step * 8, step * 8 + 8))
        assert all(len(micro_places) == micro for share in shares for micro_places in share.places(step))


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="multiple of 6"):
        Share(batch=8, micro=3, world=2)


def test_a_samples_randomness_depends_on_seed_and_place_alone():
    objective = Objective(caption_share=0.1)
    many = random_draws(range(10), 1, (4, 3, 5), objective)
    one = random_draws([7], 1, (4, 3, 5), objective)
    other = random_draws([7], 2, (4, 3, 5), objective)
    for name, value in vars(one).items():
        assert torch.equal(value[0], getattr(many, name)[7]), name
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, one.posterior)


def test_training_drops_the_image_the_text_and_both_in_5_percent_each():
    """100,000 draws; each share within 0.3 percentage points."""
    draws = random_draws(range(100_000), 0, (1, 1, 1), Objective())
    text, image = draws.text_null, draws.image_null
    shares = [(text & ~image), (~text & image), (text & image), (~text & ~image)]
    for share, percent in zip(shares, (5, 5, 5, 85), strict=True):
        assert abs(100 * share.float().mean() - percent) < 0.3
    assert abs(draws.timesteps.float().mean() - 499.5) < 3
    assert draws.timesteps.min() == 0 and draws.timesteps.max() == 999


def test_instructions_with_a_side_are_never_mirrored_and_others_half_the_time():
    transform = Transform(size=(64, 64))
    plain = [variant_of(place, 0, transform, "make it night") for place in range(1000)]
    assert 450 < sum(plain) < 550
    for text in ("move the cat to the left", "Recolour the RIGHT one.", "the leftmost cup turns clockwise"):
        assert not any(variant_of(place, 0, transform, text) for place in range(50)), text


def test_dropout_removes_the_instruction_and_caption_only_takes_precedence():
    texts = chosen_texts(
        ["a", "b", "c", "d"],
        ["A", "B", "C", "D"],
        torch.tensor([False, True, False, True]),
        torch.tensor([False, False, True, True]),
    )
    assert texts == ["a", "", "C", "D"]


def test_ahead_yields_items_in_order_and_raises_their_error():
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    received = []
    with pytest.raises(ValueError, match="the sixth"):
        for item in ahead(items(), 2):
            received.append(item)
    assert received == list(range(5))


def pooled_samples(share: Share, source=None, **more) -> PooledSamples:
    """Samples whose latents are the mean colors of their pictures in 2 x 2 cells."""

    def encode(pixels):
        mean = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2)
        return torch.cat([mean, mean[:, :1]], dim=1), torch.zeros(len(pixels), 4, 2, 2)

    def encode_texts(texts):
        return TextInput(torch.tensor([[len(text)] for text in texts]))

    settings = {"seed": 0, "pool": 16} | more
    return PooledSamples(
        source or StorybookSource(32, seed=2),
        encode_texts,
        Transform(size=(32, 32), flip=False),
        encode,
        Objective(change_share=0.5),
        share,
        **settings,
    )


def take(samples, first: int, count: int):
    steps = samples(first)
    taken = [next(steps) for _ in range(count)]
    steps.close()
    return taken


def test_a_pool_yields_each_row_as_often_as_it_is_reused():
    steps = take(pooled_samples(Share(batch=8, micro=8), reuse=3), 0, 6)
    ids = [i for step in steps for batch in step for i in batch.ids]
    assert sorted(ids) == sorted([f"2-{k}" for k in range(16)] * 3)
    assert set(ids[:16]) == set(ids[16:32])


def test_a_run_resumed_within_a_pool_gets_the_same_samples():
    share = Share(batch=8, micro=4)
    uninterrupted = take(pooled_samples(share, reuse=2), 0, 7)
    resumed = take(pooled_samples(share, reuse=2), 5, 2)
    for ours, theirs in zip(resumed, uninterrupted[5:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert list(a.ids) == list(b.ids)
            assert torch.equal(a.mean, b.mean) and torch.equal(a.draws.noise, b.draws.noise)


@pytest.mark.parametrize("reuse", [1, 2])
def test_processes_encode_only_their_rows_and_together_match_one_process(reuse):
    single = take(pooled_samples(Share(batch=8, micro=8), reuse=reuse), 0, 3)
    parts = [
        take(pooled_samples(Share(batch=8, micro=4, rank=rank, world=2), reuse=reuse), 0, 3)
        for rank in range(2)
    ]
    for step in range(3):
        both = [batch for part in parts for batch in part[step]]
        assert [i for batch in both for i in batch.ids] == list(single[step][0].ids)
        assert torch.equal(torch.cat([batch.mean for batch in both]), single[step][0].mean)
    if reuse == 1:
        half = pooled_samples(Share(batch=8, micro=4, rank=0, world=2)).pools.needed(0)
        assert len(half) == 8


def test_changed_cells_are_those_in_which_the_pictures_differ():
    [[batch]] = take(pooled_samples(Share(batch=8, micro=8)), 0, 1)
    source = StorybookSource(32, seed=2)
    for id, changed in zip(batch.ids, batch.changed, strict=True):
        pair = source[int(id.split("-")[1])]
        differ = (pair.before != pair.after).any(axis=2)
        cells = [
            [differ[:16, :16].any(), differ[:16, 16:].any()],
            [differ[16:, :16].any(), differ[16:, 16:].any()],
        ]
        assert changed[0].tolist() == np.array(cells, float).tolist()


class Broken(StorybookSource):
    """A source with unreadable rows."""

    def __init__(self, bad: set[int], count: int) -> None:
        super().__init__(32, seed=2, count=count)
        self.bad = bad

    def __getitem__(self, row):
        if row in self.bad:
            raise BrokenRow(f"row {row}", "cannot be read")
        return super().__getitem__(row)


def test_a_broken_row_is_listed_and_replaced_by_the_next(tmp_path):
    note = tmp_path / "quarantine.jsonl"
    steps = take(pooled_samples(Share(batch=8, micro=8), Broken({5}, 120), quarantine=note, pool=120), 0, 15)
    ids = [i for step in steps for batch in step for i in batch.ids]
    assert len(ids) == 120 and ids.count("2-6") == 2 and "2-5" not in ids
    assert note.read_text() == '{"id": "row 5", "reason": "cannot be read"}\n'


def test_too_many_broken_rows_stop_the_run_and_are_named(tmp_path):
    samples = pooled_samples(Share(batch=8, micro=8), Broken({5, 6, 7}, 120), pool=120)
    with pytest.raises(InputError, match=r"3 of \d+ rows .*row [567]: cannot be read"):
        take(samples, 0, 15)
