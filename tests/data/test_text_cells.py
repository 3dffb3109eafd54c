"""Cells of data sets that hold several texts, and the column names of published sets."""

import pytest

from ip2p.data.columns import find_columns, text


@pytest.mark.parametrize(
    "cell",
    [
        ["make it night", "turn it to night"],
        ("", " make it night"),
        "['make it night', \"turn the cat's hat red\"]",
        '["make it night", "x"]',
    ],
)
def test_a_list_of_texts_gives_its_first_and_never_pythons_notation(cell):
    assert text(cell) == "make it night"


@pytest.mark.parametrize("words", ["[make it] night", "[make it night]", "[1, 2]", "[" * 5000 + "]" * 5000])
def test_brackets_that_are_no_list_of_texts_stay(words):
    assert text(words) == words


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
def test_columns_of_published_sets_are_known(names):
    found = find_columns(names, of="x")
    assert tuple(found[part] for part in ("before", "after", "instruction")) == names
