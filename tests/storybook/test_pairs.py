"""Pairs with the columns of the published dataset's Hugging Face version."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p.training.storybook.pairs import PAIR_COLUMNS, draw_pair_row, write_pairs
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import Edit, sample_edit
from ip2p_storybook.scene import rng_for


def edits(count: int) -> list[Edit]:
    return [sample_edit(rng_for("pairs", i)) for i in range(count)]


def test_pairs_have_the_columns_of_the_hugging_face_version(tmp_path: Path) -> None:
    sampled = edits(3)
    assert write_pairs(sampled, tmp_path / "pairs.parquet", size=48) == 3
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert tuple(table.column_names) == PAIR_COLUMNS
    for edit, row in zip(sampled, table.to_pylist(), strict=True):
        assert row["edit_prompt"] == edit.instruction
        assert row["original_prompt"] != row["edited_prompt"]
        for column, scene in (("original_image", edit.before), ("edited_image", edit.after)):
            picture = np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))
            assert np.array_equal(picture, draw(scene, 48))


def test_the_file_declares_its_image_columns_for_hugging_face(tmp_path: Path) -> None:
    write_pairs(edits(1), tmp_path / "pairs.parquet", size=32)
    metadata = pq.read_schema(tmp_path / "pairs.parquet").metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert features["original_image"] == {"_type": "Image"}
    assert features["edit_prompt"] == {"dtype": "string", "_type": "Value"}


def test_more_rows_than_one_row_group_are_all_written(tmp_path: Path) -> None:
    edit = edits(1)[0]
    assert write_pairs([edit] * 101, tmp_path / "pairs.parquet", size=32) == 101
    assert pq.read_metadata(tmp_path / "pairs.parquet").num_rows == 101


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield from edits(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_pairs(broken(), tmp_path / "pairs.parquet", size=32)
    assert list(tmp_path.iterdir()) == []


def test_both_captions_have_the_same_form() -> None:
    edit = sample_edit(rng_for("form"), "style")
    row = draw_pair_row(edit, 32)
    assert row.original_image.shape == row.edited_image.shape == (32, 32, 3)
    same = set(row.original_prompt.split()) & set(row.edited_prompt.split())
    assert len(same) >= 3
