"""Reading captions from every kind of table: cleaning, deduplication, limits and seeded samples."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.base.errors import InputError
from ip2p.synth import captions as module
from ip2p.synth.captions import Caption, Rules, blocker, clean, is_in, read_block_list, read_captions, take

ROWS = ["a red fox in the snow", "an old harbour at dusk", "two sisters on a bench"]


def texts(read):
    return [caption.text for caption in read.captions]


def write(folder, ending):
    path = folder / f"captions{ending}"
    if ending == ".txt":
        path.write_text("\n\n".join(ROWS) + "\n", encoding="utf-8-sig")
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps({"TEXT": row, "URL": "u" + row}) + "\n" for row in ROWS))
    elif ending == ".csv":
        path.write_text("id,Caption\n" + "".join(f'{n},"{row}"\n' for n, row in enumerate(ROWS)))
    elif ending == ".tsv":
        path.write_text("prompt\tother\n" + "".join(f"{row}\tx\n" for row in ROWS))
    else:
        pictures = pa.array([b"x" * 10] * 3, pa.binary())
        pq.write_table(pa.table({"TEXT": ROWS, "jpg": pictures}), path)
    return path


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_table_gives_the_same_captions(tmp_path, ending):
    assert texts(read_captions(write(tmp_path, ending))) == ROWS


def test_all_files_of_a_folder_are_read_and_duplicate_captions_are_dropped(tmp_path):
    for ending in (".txt", ".csv"):
        write(tmp_path, ending)
    read = read_captions(tmp_path)
    assert texts(read) == ROWS and read.rows == 6 and read.left_out == {"doubled": 3}
    assert "3 doubled" in read.lines()[0]


def test_laion_columns_filter_by_score_safety_and_language(tmp_path):
    table = pa.table(
        {
            "TEXT": [f"a picture of the number {n}" for n in range(6)],
            "URL": ["a", "b", "c", "d", "e", "a"],
            "AESTHETIC_SCORE": [6.5, 4.0, 7.0, 7.0, None, 8.0],
            "NSFW": ["UNLIKELY", "UNLIKELY", "NSFW", "UNLIKELY", "UNLIKELY", "UNLIKELY"],
            "punsafe": [0.01, 0.01, 0.01, 0.9, 0.01, 0.01],
        }
    )
    pq.write_table(table, tmp_path / "laion.parquet")
    read = read_captions(tmp_path / "laion.parquet", rules=Rules(min_score=6))
    assert read.captions == [Caption(text="a picture of the number 0", url="a", score=6.5)]
    assert read.left_out == {"below the score": 2, "unsafe by their table": 2, "doubled": 1}
    rows = [{"text": "a boat on a lake", "language": "de"}, {"text": "a boat on a sea", "language": "EN"}]
    assert texts(take(rows, of="rows", rules=Rules())) == ["a boat on a sea"]


def test_an_invalid_score_never_passes_a_minimum():
    scores = ("nan", float("nan"), "inf", 10**400, "7")
    rows = [{"text": f"a picture of the number {n}", "score": score} for n, score in enumerate(scores)]
    read = take(rows, of="rows", rules=Rules(min_score=6))
    assert texts(read) == ["a picture of the number 4"] and read.left_out == {"below the score": 4}
    assert [caption.score for caption in take(rows, of="rows", rules=Rules()).captions] == [*[None] * 4, 7]


def test_rows_without_a_caption_are_counted_and_the_first_non_empty_column_is_used(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [
        {"id": 1},
        {"id": 2, "text": None, "caption": "a red fox in the snow"},
        {"id": 3, "text": " <br> ", "caption": ["", "an old harbour at dusk", "another"]},
        {"id": 4, "text": {"en": "a dog in a field", "de": "ein Hund"}},
        {"id": 5, "text": [], "prompt": 7},
        {"id": 6, "text": {"en": "a dog"}, "caption": "two sisters on a bench"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_captions(path)
    assert texts(read) == ROWS and read.rows == 6 and read.left_out == {"empty": 3}
    assert texts(read_captions(path, column="caption")) == ROWS
    with pytest.raises(InputError, match=r"no usable captions: 6 empty"):
        read_captions(path, column="id")


def test_a_table_whose_rows_have_no_known_column_is_refused(monkeypatch):
    rows = [{"words": "a red fox"}, {"more": 1}, {"text": "an old harbour"}]
    with pytest.raises(InputError, match="caption column. Its columns: words, more"):
        take(rows[:2], of="t.csv", rules=Rules())
    assert texts(take(rows, of="t.csv", rules=Rules())) == ["an old harbour"]
    monkeypatch.setattr(module, "LOOK", 2)
    with pytest.raises(InputError, match="caption column. Its columns: words, more"):
        take(rows, of="t.csv", rules=Rules())


def test_lone_surrogates_are_removed(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(r'{"text": "a red fox \ud83d in the snow", "url": "u\udc00", "\ud800": 1}' + "\n")
    assert texts(read_captions(path)) == ["a red fox in the snow"]
    path.write_text(r'{"\ud800": 1}' + "\n")
    with pytest.raises(InputError, match="no known caption column"):
        read_captions(path)


def test_list_columns_of_parquet_are_refused_with_an_explanation(tmp_path):
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"captions": [["a red fox"]], "n": [1]}), path)
    for column in (None, "captions"):
        flat = r"Its columns: n \(in parquet, only columns of plain values are read\)"
        with pytest.raises(InputError, match=flat):
            read_captions(path, column=column)


def test_duplicates_ignore_case_whitespace_and_final_punctuation():
    rows = [{"text": text} for text in ("A red  fox.", "a red fox", "a red fox!", "a red foxglove")]
    assert texts(take(rows, of="rows", rules=Rules())) == ["A red fox.", "a red foxglove"]


def test_captions_are_cleaned_of_markup_and_control_characters():
    assert clean(' "A&amp;B <b>bold</b>\n\ttree\u200b" ') == "A&B bold tree"
    assert clean("it's 'fine'") == "it's 'fine'"


def test_captions_outside_the_length_limits_are_counted_by_reason():
    rows = [{"text": text} for text in ("fox", "", "a " * 60, "x" * 400 + " y", "a fox")]
    read = take(rows, of="rows", rules=Rules())
    assert texts(read) == ["a fox"]
    assert read.left_out == {"too short": 1, "empty": 1, "too long": 2}


def test_a_sample_does_not_depend_on_row_order_and_is_a_prefix_of_a_larger_one():
    rows = [{"text": f"a thing called {n}"} for n in range(200)]
    few = texts(take(rows, of="rows", rules=Rules(), sample=10, seed=3))
    assert few == texts(take(rows[::-1], of="rows", rules=Rules(), sample=10, seed=3))
    assert few == texts(take(rows, of="rows", rules=Rules(), sample=50, seed=3))[:10]
    assert few != texts(take(rows, of="rows", rules=Rules(), sample=10, seed=4))
    full = take(rows, of="rows", rules=Rules(), sample=500, seed=3)
    assert len(full.captions) == 200 and "not drawn" not in full.left_out
    assert take(rows, of="rows", rules=Rules(), sample=10).left_out == {"not drawn": 190}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The old town of Café Müller by the river", "english"),
        ("oil painting, sunset, boats", "english"),
        ("El Capitan at dawn", "english"),
        ("ein Hund mit einem Ball auf der Wiese", "latin"),
        ("le chat dans la cuisine avec une tasse", "latin"),
        ("un perro en la playa con los niños", "latin"),
        ("собака на пляже", "any"),
        ("海辺の犬", "any"),
        ("12345 !!", "any"),
    ],
)
def test_language_is_detected_by_letters_and_common_words(text, language):
    order = ["any", "latin", "english"]
    assert [is_in(text, each) for each in order] == [n <= order.index(language) for n in range(3)]


def test_the_block_list_finds_whole_words_and_their_plurals():
    find = blocker(["gore", "white power", "box"])
    assert find("A scene of  GORE.") == "gore" and find("two boxes") == "box"
    assert find("White   power sign") == "white power"
    assert find("Al Gore's gorge, a boxer") == "gore"
    assert find("a gorge with a boxer") is None
    assert blocker([])("gore") is None
    read = take([{"text": t} for t in ("a nude figure", "a red fox")], of="rows", rules=Rules())
    assert read.left_out == {"on the block-list": 1}


def test_a_block_list_is_read_from_a_file(tmp_path):
    path = tmp_path / "block.txt"
    path.write_text("# our own\nclown  # scary\n\nclown\nspider web\n")
    assert read_block_list(path) == ("clown", "spider web")


def test_unknown_columns_and_tables_without_usable_captions_are_refused(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("words,n\na red fox,1\n")
    with pytest.raises(InputError, match="no known caption column. Its columns: words, n"):
        read_captions(path)
    assert texts(read_captions(path, column="Words")) == ["a red fox"]
    with pytest.raises(InputError, match="no column story. Its columns: words, n"):
        read_captions(path, column="story")
    with pytest.raises(InputError, match="no usable captions: 1 too short"):
        read_captions(path, column="words", rules=Rules(min_words=9))
    with pytest.raises(InputError, match="--sample is 0"):
        read_captions(path, sample=0)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "a fox"}\nno json\n', "line 2 is not a JSON object"),
        ("a.parquet", b"PAR1 cut", "not a complete parquet"),
        ("a.docx", b"word", "not a supported table"),
    ],
)
def test_broken_files_are_refused(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=expected):
        read_captions(tmp_path / name)


def test_a_missing_file_gets_a_suggestion(tmp_path):
    write(tmp_path, ".txt")
    with pytest.raises(InputError, match=r"Did you mean .*captions.txt"):
        read_captions(tmp_path / "caption.txt")


def test_a_hub_data_set_is_read_from_its_parquet_files(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet")
    calls = []

    def cached(name, split, revision):
        calls.append((name, split, revision))
        return [path], "c0ffee"

    monkeypatch.setattr(module.hub, "cached_files", cached)
    assert texts(read_captions("someone/captions", split="test", revision="v2")) == ROWS
    assert calls == [("someone/captions", "test", "v2")]

    class System:
        def open(self, name, mode):
            return open(name, mode)

    monkeypatch.setattr(module.hub, "remote_files", lambda *_: ([str(path)], "c0ffee"))
    monkeypatch.setattr(module.hub, "filesystem", System)
    assert texts(read_captions("someone/captions", stream=True)) == ROWS
    with pytest.raises(InputError, match="--stream does not apply"):
        read_captions(path, stream=True)
