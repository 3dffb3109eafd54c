"""Exact triples: no spatial edits, captions that show every change, and deterministic for a seed."""

import pyarrow.parquet as pq
import pytest

from ip2p.cli import main as cli
from ip2p_storybook.captions import Form, say_page
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.language import is_held_out_phrasing
from ip2p_storybook.scene import has_held_out_combination, rng_for
from ip2p_storybook.triples import TRIPLE_COLUMNS as COLUMNS
from ip2p_storybook.triples import exact_triples, mentions_all


def test_no_triple_moves_a_thing_and_captions_show_every_change() -> None:
    kinds = set()
    for triple in exact_triples(1500, 0):
        steps = triple.edit.steps or (triple.edit,)
        kinds |= {step.kind for step in steps}
        assert triple.caption != triple.edited_caption
        for step in steps:
            assert say_page(step.before, triple.form) != say_page(step.after, triple.form)
    assert "move" not in kinds
    assert len(kinds) == 13


def test_a_form_without_sides_or_sizes_cannot_mention_edits_by_side_or_size() -> None:
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


def test_triples_depend_only_on_seed_and_index() -> None:
    triples = list(exact_triples(12, 4))
    assert list(exact_triples(5, 4, first=7)) == triples[7:]
    assert [t.id for t in exact_triples(12, 5)] != [t.id for t in triples]
    assert len({t.id for t in triples}) == 12


@pytest.mark.parametrize("split", ["train", "test", "unseen_phrasings", "unseen_combinations"])
def test_each_split_uses_only_its_own_pages_and_phrasings(split: str) -> None:
    for triple in exact_triples(80, 1, split):
        edit = triple.edit
        assert edit.before.seed % 2 == (split != "train")
        assert is_held_out_phrasing(edit.phrasing) == (split == "unseen_phrasings")
        if split != "unseen_combinations":
            assert not has_held_out_combination(edit.before) and not has_held_out_combination(edit.after)


def test_removing_a_thing_only_removes_words_from_the_caption() -> None:
    for triple in exact_triples(300, 2):
        if triple.edit.kind == "remove" and len(triple.edit.before.things) > 1:
            before, after = triple.caption, triple.edited_caption
            assert len(after) < len(before)
            before_words = iter(before.replace(",", " ,").replace(" and ", " , ").split())
            after_words = after.replace(",", " ,").replace(" and ", " , ").split()
            assert all(word in before_words for word in after_words), (before, after)  # a subsequence


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
