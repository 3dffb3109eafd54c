"""The perception heads: their labels, losses, metrics and gates."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ip2p.training.objective import Draws, EditBatch
from ip2p.training.storybook.editor import head_weight, missed_gates, new_unet, start_as_copy
from ip2p.training.storybook.perception import (
    FIELDS,
    CellHead,
    Perception,
    cell_labels,
    cells_loss,
    change_iou,
    change_loss,
    named_right,
)
from ip2p.training.storybook.presets import PRESETS
from ip2p_storybook.labels import EDIT_SIZES, IGNORED, PAGE_SIZES, THING_SIZES


def labels_of(batch=3, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 3, (batch, side, side), generator=generator)
    things = torch.stack(
        [torch.randint(int(field == "kind"), size, (batch, 4), generator=generator)
         for field, size in zip(FIELDS, THING_SIZES, strict=True)], dim=-1
    )  # fmt: skip
    things[:, 2:] = IGNORED
    return cells, things


def test_cells_take_the_classes_of_their_thing():
    """Oracle: a loop over the cells."""
    cells, things = labels_of()
    labels = cell_labels(cells, things)
    for b in range(3):
        for y in range(4):
            for x in range(4):
                number = int(cells[b, y, x])
                expected = (
                    things[b, number - 1].tolist()
                    if number
                    else [0 if field == "kind" else IGNORED for field in FIELDS]
                )
                assert labels[b, :, y, x].tolist() == expected


def test_the_cell_loss_matches_cross_entropy_per_field_and_is_zero_for_certain_answers():
    cells, things = labels_of()
    labels = cell_labels(cells, things)
    logits = torch.randn(3, sum(THING_SIZES), 4, 4, generator=torch.Generator().manual_seed(1))
    total, first = 0.0, 0
    for field, (name, size) in enumerate(zip(FIELDS, THING_SIZES, strict=True)):
        part, field_labels = logits[:, first : first + size], labels[:, field]
        first += size
        flat, rows = part.permute(0, 2, 3, 1).reshape(-1, size), field_labels.reshape(-1)
        thing = F.cross_entropy(flat[cells.reshape(-1) > 0], rows[cells.reshape(-1) > 0])
        total += float(thing) * (1.0 if name == "kind" else 0.5)
        if name == "kind":
            total += 0.5 * float(F.cross_entropy(flat[cells.reshape(-1) == 0], rows[cells.reshape(-1) == 0]))
    assert float(cells_loss(logits, labels)) == pytest.approx(total, rel=1e-5)
    sure = torch.cat(
        [
            F.one_hot(labels[:, k].clamp(min=0), size).permute(0, 3, 1, 2)
            for k, size in enumerate(THING_SIZES)
        ],
        1,
    )
    assert float(cells_loss(50.0 * sure, labels)) < 1e-6


def test_a_thing_is_classified_by_all_of_its_cells():
    cells = torch.tensor([[[1, 1], [1, 0]]])
    things = torch.full((1, 4, len(FIELDS)), IGNORED)
    things[0, 0] = 1
    logits = torch.zeros(1, sum(THING_SIZES), 2, 2)
    logits[0, 2, 0, 0] = 1.0  # one cell slightly favors class 2
    logits[0, 1, 0, 1] = logits[0, 1, 1, 0] = 0.8  # two favor class 1
    logits[0, 2, 1, 1] = 9.0  # not a cell of the thing
    counts = named_right(logits, cells, things)
    assert counts["kind"] == (1, 1)
    assert all(count[1] == 1 for count in counts.values())
    hidden = named_right(logits, torch.zeros_like(cells), things)
    assert hidden["kind"] == (0, 0)


def test_change_iou_counts_cells_and_change_loss_balances_the_classes():
    changed = torch.zeros(2, 4, 4)
    changed[0, 0, 0] = 1
    changed[1, :2] = 1
    logits = torch.where(changed > 0, 5.0, -5.0)
    assert change_iou(logits, changed > 0) == 1.0
    logits[0, 3, 3] = 5.0
    assert change_iou(logits, changed > 0) == pytest.approx(9 / 10)
    both = torch.tensor([True, True])
    # The one changed cell of the first sample weighs as much as its other fifteen.
    none = torch.full_like(changed, -3.0)
    lone = change_loss(none[:1], changed[:1], both[:1])
    expected = (F.softplus(torch.tensor(3.0)) + F.softplus(torch.tensor(-3.0))) / 2
    torch.testing.assert_close(lone, expected)
    assert change_loss(none, changed, ~both) == 0


def test_a_label_counts_only_if_the_conditions_reveal_it():
    torch.manual_seed(0)
    unet = SimpleNamespace(
        config=SimpleNamespace(block_out_channels=(16, 32)),
        down_blocks=[torch.nn.Identity()],
        up_blocks=[torch.nn.Identity()],
    )
    heads = Perception(unet, 8)
    heads._features = {"before": torch.randn(4, 32, 2, 2), "after": torch.randn(4, 16, 4, 4)}
    context = torch.randn(4, 5, 8)
    none = torch.zeros(4, dtype=torch.bool)
    # Row 0 shows all; row 1 lost its text, row 2 its image; row 3 has a caption and no image.
    draws = Draws(
        posterior=none,
        noise=none,
        timesteps=none,
        text_null=torch.tensor([False, True, False, False]),
        image_null=torch.tensor([False, False, True, True]),
        caption_only=torch.tensor([False, False, False, True]),
    )

    def loss(part=None, row=0):
        cells, things = labels_of(4)
        page_labels = {
            "cells": cells,
            "things": things,
            "page": torch.zeros(4, len(PAGE_SIZES), dtype=torch.long),
        }
        labels = {
            **{
                f"{page}_{key}": value.clone()
                for page in ("before", "after")
                for key, value in page_labels.items()
            },
            "edit": torch.zeros(4, len(EDIT_SIZES), dtype=torch.long),
            "weight": torch.tensor(0.5),
        }
        changed = torch.zeros(4, 1, 4, 4)
        if part == "changed":
            changed[row, 0, 0, 0] = 1
        elif part in ("before", "after"):
            labels[f"{part}_things"][row, :2] = 0
        elif part:
            labels[part][row] = 1
        zero = torch.zeros(())
        batch = EditBatch(
            before=zero,
            mean=zero,
            std=zero,
            draws=draws,
            text=zero,
            ids="abcd",
            changed=changed,
            labels=labels,
        )
        return float(heads.loss(batch, context)[0].detach())

    counted = {
        part: [abs(loss(part, row) - loss()) > 1e-6 for row in range(4)]
        for part in ("before", "before_page", "after", "after_page", "changed", "edit")
    }
    assert counted == {
        "before": [True, True, False, False],
        "before_page": [True, True, False, False],
        "after": [True, False, False, True],
        "after_page": [True, False, False, True],
        "changed": [True, False, False, False],
        "edit": [True, False, True, False],
    }


def test_heads_read_the_unets_features_at_any_resolution():
    preset = PRESETS["smoke"]
    unet = new_unet(preset)
    heads = Perception(unet, preset.text_width)
    unet(torch.randn(2, 32, 8, 8), torch.tensor(999), torch.randn(2, 5, 32))
    predictions = heads.see()
    assert predictions.before.shape == predictions.after.shape == (2, sum(THING_SIZES), 8, 8)
    assert predictions.changed.shape == (2, 8, 8) and predictions.page_after.shape == (2, sum(PAGE_SIZES))


def test_a_cell_head_learns_a_cells_class_from_coarser_features():
    torch.manual_seed(0)
    head = CellHead(8, 2, 3, 2, hidden=16)
    cells = torch.randint(0, 3, (32, 4, 4))
    marks = F.one_hot(cells, 3).permute(0, 3, 1, 2).float()
    features = F.pixel_unshuffle(marks, 2)[:, :8].contiguous()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(80):
        loss = F.cross_entropy(head(features)[0], cells)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35


def test_missed_gates_are_reported_as_percentages():
    preset = PRESETS["cpu"]
    assert missed_gates(preset, {"kind": 0.95, "change": 0.7}) == []
    assert missed_gates(preset, {"kind": 0.81, "change": 0.5}) == [
        "kind is 81.0%, below 90%",
        "change is 50.0%, below 70%",
    ]


def test_the_head_weight_halves_down_to_its_minimum():
    preset = PRESETS["cpu"]
    weight = head_weight(preset, 32)
    assert weight(0) == preset.head_weight
    half = round(preset.head_half_life / 32)
    assert weight(half) == pytest.approx(preset.head_weight / 2)
    assert weight(100 * half) == preset.head_weight_least


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_started_as_a_copy_returns_the_page(name):
    preset = PRESETS[name]
    torch.manual_seed(0)
    unet = new_unet(preset)
    start_as_copy(unet)
    page = torch.randn(2, preset.latent_channels, preset.cells, preset.cells)
    noisy, text = 3 * torch.randn_like(page), torch.randn(2, 7, preset.text_width)
    with torch.no_grad():
        predicted = unet(torch.cat([noisy, page], dim=1), torch.tensor(500), text).sample
    assert (predicted - page).square().mean() < 1e-4


def test_a_network_too_narrow_to_copy_is_refused():
    unet = new_unet(replace(PRESETS["smoke"], unet_channels=(16, 32)))
    with pytest.raises(ValueError, match="8 groups of 2 channels cannot hold 16 latent channels"):
        start_as_copy(unet)
