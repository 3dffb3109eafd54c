"""Exact triples: no spatial edits, nothing changed that the captions do not show, the same for a seed."""

import pyarrow.parquet as pq
import pytest

from ip2p.cli import main as cli
from ip2p_storybook.captions import Form, say_page
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.language import is_held_out_phrasing
from ip2p_storybook.scene import has_held_out_combination, rng_for
from ip2p_storybook.triples import TRIPLE_COLUMNS as COLUMNS
from ip2p_storybook.triples import exact_triples, mentions_all


def test_no_triple_moves_a_thing_or_hides_its_change() -> None:
    kinds = set()
    for triple in exact_triples(1500, 0):
        steps = triple.edit.steps or (triple.edit,)
        kinds |= {step.kind for step in steps}
        assert triple.caption != triple.edited_caption
        for step in steps:
            assert say_page(step.before, triple.form) != say_page(step.after, triple.form)
    assert "move" not in kinds
    assert len(kinds) == 13


def test_a_form_without_sides_or_sizes_tells_no_edit_by_them() -> None:
    silent = Form(sides=False, sizes=False)
    mentioned = [
        mentions_all(sample_edit(rng_for("bigger", k), kind="bigger", split="test"), silent)
        for k in range(30)
    ]
    assert not any(mentioned)
    edits = [sample_edit(rng_for("recolour", k), kind="recolour", split="test") for k in range(60)]
    by_side = ["left" in e.instruction or "right" in e.instruction for e in edits]
    assert any(by_side)
    assert not any(mentions_all(e, silent) for e, by in zip(edits, by_side, strict=True) if by)
    assert all(mentions_all(edit, Form()) for edit in edits)


def test_triples_follow_from_seed_and_number_alone() -> None:
    whole = list(exact_triples(12, 4))
    assert list(exact_triples(5, 4, first=7)) == whole[7:]
    assert [t.id for t in exact_triples(12, 5)] != [t.id for t in whole]
    assert len({t.id for t in whole}) == 12


@pytest.mark.parametrize("split", ["train", "test", "unseen_phrasings", "unseen_combinations"])
def test_splits_keep_to_their_pages_and_phrasings(split: str) -> None:
    for triple in exact_triples(80, 1, split):
        edit = triple.edit
        assert edit.before.seed % 2 == (split != "train")
        assert is_held_out_phrasing(edit.phrasing) == (split == "unseen_phrasings")
        if split != "unseen_combinations":
            assert not has_held_out_combination(edit.before) and not has_held_out_combination(edit.after)


def test_things_that_an_edit_leaves_alone_are_said_alike() -> None:
    for triple in exact_triples(300, 2):
        if triple.edit.kind == "remove" and len(triple.edit.before.things) > 1:
            before, after = triple.caption, triple.edited_caption
            assert len(after) < len(before)
            words = iter(before.replace(",", " ,").replace(" and ", " , ").split())
            again = after.replace(",", " ,").replace(" and ", " , ").split()
            assert all(word in words for word in again), (before, after)  # the words in their order


def test_the_command_writes_triples_and_varied_captions(tmp_path, capsys) -> None:
    triples, captions = tmp_path / "triples.parquet", tmp_path / "captions.txt"
    line = ["storybook", "draw", "--count", "6", "--seed", "3", "--split", "test"]
    cli.main([*line, "--triples", str(triples), "--captions", str(captions), "--varied"])
    assert capsys.readouterr().out.split() == [str(captions), str(triples)]
    table = pq.read_table(triples)
    assert tuple(table.column_names) == COLUMNS
    expected = list(exact_triples(6, 3, "test"))
    assert table["instruction"].to_pylist() == [t.instruction for t in expected]
    assert table["id"].to_pylist() == [t.id for t in expected]
    assert set(table["source"].to_pylist()) == {"storybook"}
    varied = captions.read_text()
    cli.main([*line, "--captions", str(captions), "--overwrite"])
    assert captions.read_text() != varied
    assert len(captions.read_text().splitlines()) == len(varied.splitlines()) == 6
