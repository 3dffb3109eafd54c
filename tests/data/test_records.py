"""Rows and their pictures."""

import pickle

import numpy as np
import pytest
from layouts import picture

from ip2p.data.records import BrokenRow, MissingPart, open_picture


def test_encoded_and_plain_pictures_open_as_rgb():
    pixels = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    assert np.array_equal(np.asarray(open_picture(pixels, "a")), pixels)
    opened = open_picture(picture(1, "JPEG"), "a")
    assert (opened.mode, opened.size) == ("RGB", (24, 20))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (picture(1, "JPEG")[:-200], "damaged or truncated"),
        (b"<html>gone</html>", "web page"),
        (b"", "empty"),
        (np.zeros((20, 24), np.uint8), r"uint8 \[20, 24\], not uint8"),
        (np.zeros((20, 24, 3), np.float32), "float32"),
    ],
)
def test_a_bad_picture_names_its_row(data, reason):
    with pytest.raises(BrokenRow, match=reason) as error:
        open_picture(data, "row-7")
    assert error.value.id == "row-7"
    assert str(error.value).startswith("row-7: ")


def test_a_broken_row_can_be_pickled():
    error = pickle.loads(pickle.dumps(MissingPart("a", "before: missing")))
    assert (type(error), error.id, error.reason) == (MissingPart, "a", "before: missing")
