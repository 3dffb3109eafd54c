"""Data set cells with several texts, and the column names of published data sets."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import IMAGE, add, make_pairs

from ip2p.base.errors import InputError
from ip2p.data.check import check
from ip2p.data.columns import find_columns, text
from ip2p.data.loading import open_source
from ip2p.data.records import NotText
from ip2p.synth.records import read_triples


@pytest.mark.parametrize(
    "cell",
    [
        ["make it night", "turn it to night"],
        ("", " make it night"),
        "['make it night', \"turn the cat's hat red\"]",
        '["make it night", "x"]',
        "('make it night', 'x')",
        b"make it night",
    ],
)
def test_a_list_of_texts_gives_its_first_text(cell):
    assert text(cell) == "make it night"


@pytest.mark.parametrize(
    "words",
    ["(very:1.2) (make it night)", "[make it] night", "[make it night]", "[1, 2]", "[" * 5000 + "]" * 5000],
)
def test_brackets_that_are_not_a_list_of_texts_are_kept(words):
    assert text(words) == words


def write_objects(folder, layout):
    """Three pairs whose instructions are objects."""
    cells = [{"role": "user", "content": f"make it night {k}"} for k in range(3)]
    pairs = make_pairs(3)
    folder.mkdir()
    if layout == "parquet":
        pictures = [
            pa.array([{"bytes": p, "path": None} for p in side], IMAGE)
            for side in zip(*((pair.before, pair.after) for pair in pairs), strict=True)
        ]
        table = {"original_image": pictures[0], "edit_prompt": cells, "edited_image": pictures[1]}
        pq.write_table(pa.table(table), folder / "a.parquet")
    elif layout == "shards":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for number, pair in enumerate(pairs):
                add(tar, f"{number}.before.jpg", pair.before)
                add(tar, f"{number}.after.png", pair.after)
                add(tar, f"{number}.json", json.dumps({"instruction": cells[number]}).encode())
    else:
        lines = []
        for number, pair in enumerate(pairs):
            (folder / f"{number}.jpg").write_bytes(pair.before)
            (folder / f"{number}.png").write_bytes(pair.after)
            picture = f"{number}.jpg" if number else {"path": f"{number}.jpg"}
            lines.append({"before": picture, "after": f"{number}.png", "instruction": [cells[number]]})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("layout", ["parquet", "shards", "folders"])
def test_an_object_in_a_text_column_is_refused_with_its_keys(tmp_path, layout):
    source = open_source(str(write_objects(tmp_path / "set", layout)))
    for row in range(3):
        with pytest.raises(NotText, match=r"instruction: an object \(role, content\) is no text"):
            source[row]
    [finding] = check(source).defects
    assert (finding.name, finding.count) == ("no words", 3)
    assert all("an object (role, content)" in id for id in finding.ids)


def test_a_triple_with_an_object_is_refused_with_its_keys(tmp_path):
    row = {"caption": "a", "instruction": {"text": "b"}, "edited_caption": "c"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"t.jsonl, row 1: instruction: an object \(text\) is no text"):
        read_triples(tmp_path / "t.jsonl")


def test_an_empty_list_is_an_empty_text():
    assert text([]) == text([None, ""]) == text(None) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("src_img", "edited_img", "edited_prompt_list"),  # OmniEdit
        ("image_file", "edited_file", "edit_instruction"),  # AnyEdit
        ("INPUT_IMG", "OUTPUT_IMG", "EDITING_INSTRUCTION"),  # HumanEdit
    ],
)
def test_columns_of_published_data_sets_are_known(names):
    found = find_columns(names, of="x")
    assert tuple(found[part] for part in ("before", "after", "instruction")) == names
