"""Small data sets in every layout.

Not a conftest: `from conftest import ...` in tests would import this one and not the one above.
"""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ip2p.data.records import BrokenRow, Pair


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """An encoded picture of smooth noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def make_pair(number: int, **changes) -> Pair:
    """A pair with every field; its pictures are a JPEG and a PNG."""
    fields = {
        "id": f"pair-{number}",
        "before": picture(2 * number, "JPEG"),
        "after": picture(2 * number + 1),
        "instruction": f"make it number {number}",
        "caption": f"a page, number {number}",
        "edited_caption": f"another page — “{number}”",
        "scores": {"seed": 100 + number, "clip_sim_dir": 0.25 + number / 64},
    }
    return Pair(**(fields | changes))


class Rows:
    """A source that returns given pairs or raises given errors."""

    endless = False

    def __init__(self, rows, *, name="rows", key="k"):
        self.rows, self.name, self.key = rows, name, key

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if isinstance(self.rows[row], BrokenRow):
            raise self.rows[row]
        return self.rows[row]

    def blocks(self):
        return [range(len(self.rows))]


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_hub(path, pairs, *, rows_a_group=2, plain=False):
    """Parquet in the Hugging Face version's columns; `plain`: pictures as bytes, not structs."""

    def cell(data):
        return data if plain else {"bytes": data, "path": None}

    kind = pa.binary() if plain else IMAGE
    table = pa.table(
        {
            "original_image": pa.array([cell(p.before) for p in pairs], kind),
            "original_prompt": [p.caption for p in pairs],
            "edit_prompt": [p.instruction for p in pairs],
            "edited_prompt": [p.edited_caption for p in pairs],
            "edited_image": pa.array([cell(p.after) for p in pairs], kind),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def write_original(folder, pairs, *, seeds=True):
    """The layout of the paper's code, two seeds per prompt."""
    listed = {}
    for number, pair in enumerate(pairs):
        name, seed = f"{number // 2:07}", pair.scores["seed"]
        inner = folder / name
        inner.mkdir(parents=True, exist_ok=True)
        words = {"caption" if number < 2 else "input": pair.caption}
        words |= {"edit": pair.instruction, "output": pair.edited_caption}
        (inner / "prompt.json").write_text(json.dumps(words))
        (inner / f"{seed}_0.jpg").write_bytes(pair.before)
        (inner / f"{seed}_1.jpg").write_bytes(pair.after)
        with open(inner / "metadata.jsonl", "a") as file:
            file.write(json.dumps(dict(pair.scores)) + "\n")
        listed.setdefault(name, []).append(seed)
    if seeds:
        (folder / "seeds.json").write_text(json.dumps([[name, seeds] for name, seeds in listed.items()]))
    return folder


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_pairs(count: int = 5) -> list[Pair]:
    return [make_pair(number) for number in range(count)]
