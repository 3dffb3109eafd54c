import errno
import json
import os
import pickle
import resource
import select
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_rows import Child, Rows

from ip2p.base.errors import InputError, ModelError, ResourceError
from ip2p.base.ledger import Ledger
from ip2p.models.text import Prompt, encode_prompt
from ip2p.training import cache as caches
from ip2p.training.cache import (
    LatentCache,
    TextCache,
    build_cache,
    encode_pictures,
    text_key,
    weights_key,
)
from ip2p.training.transform import Transform

SQUARE = Transform(size=(32, 32))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(caches, "PART_ROWS", 4)


def build(source, bundle, folder, transform=SQUARE, **more) -> LatentCache:
    return build_cache(source, bundle, transform, folder, **{"dtype": "fp32", "say": lambda _: None, **more})


def home(folder: Path) -> Path:
    (only,) = folder.iterdir()
    return only


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every part, and its line of the manifest."""
    contents = {path.name: path.read_bytes() for path in folder.glob("*/*.latents")}
    lines = [json.loads(line) for line in (home(folder) / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        contents[f"line {line['part']}"] = json.dumps(line).encode()
    assert len(lines) == len(contents) - len(lines), "one line a part"
    return contents


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*/*.latents")}


@pytest.fixture(scope="module")
def tiny_bundle(tiny_model_dir):
    """The tiny model's networks in fp32. Do not modify them."""
    from ip2p.models.bundle import load_bundle

    return load_bundle(tiny_model_dir)


# --- latents ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoder(tiny_model_dir):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_model_dir / "vae").eval()


@pytest.mark.parametrize("transform", [SQUARE, Transform(size=(40, 24), resize_to=28, crops=3)])
def test_cached_latents_match_diffusers_posteriors_of_the_transformed_pictures(
    tiny_bundle, autoencoder, tmp_path, transform
):
    rows = Rows(6)
    cache = build(rows, tiny_bundle, tmp_path, transform, batch=5)
    assert cache.variants == transform.variants
    for place in range(6):
        for variant in range(transform.variants):
            got = cache.read([place], [variant])
            for picture, number in zip(transform(rows[place], variant), (0, 1), strict=True):
                with torch.no_grad():
                    posterior = autoencoder.encode(2 * (picture[None] / 255) - 1).latent_dist
                if number == 0:
                    torch.testing.assert_close(got.before, posterior.mode(), rtol=1e-5, atol=1e-5)
                else:
                    torch.testing.assert_close(got.mean, posterior.mean, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(got.std, posterior.std, rtol=1e-5, atol=1e-5)


def test_the_odd_variant_encodes_the_mirrored_picture(tiny_bundle, tmp_path):
    rows = Rows(1)
    got = build(rows, tiny_bundle, tmp_path).read([0], [1])
    mirrored = torch.from_numpy(rows[0].before[:, ::-1].copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(
        got.before, encode_pictures(tiny_bundle.vae, mirrored)[0], rtol=1e-5, atol=1e-5
    )
    # The encoder is not symmetric, so this is not the mirrored latent.
    plain = encode_pictures(tiny_bundle.vae, mirrored.flip(-1))[0]
    assert (got.before - plain.flip(-1)).abs().max() > 1e-3


def test_equal_pictures_have_equal_latents_in_every_variant(tiny_bundle, tmp_path):
    transform = Transform(size=(24, 24), resize_to=32, crops=4)
    cache = build(Rows(5, same=True), tiny_bundle, tmp_path, transform, batch=7)
    places, variants = np.divmod(np.arange(20), 4)
    got = cache.read(places, variants)
    torch.testing.assert_close(got.before, got.mean, rtol=1e-5, atol=1e-5)
    assert len({row.numpy().tobytes() for row in got.before}) == 20


def test_fp16_latents_are_the_fp32_latents_rounded(tiny_bundle, tmp_path):
    full = build(Rows(3), tiny_bundle, tmp_path).read([0, 1, 2], [0, 1, 0])
    half = build(Rows(3), tiny_bundle, tmp_path, dtype="fp16").read([0, 1, 2], [0, 1, 0])
    for name in ("before", "mean", "std"):
        assert getattr(half, name).dtype == torch.float32
        assert torch.equal(getattr(half, name), getattr(full, name).half().float())


def test_bf16_autocast_is_close_and_uses_a_separate_cache(tiny_bundle, tmp_path):
    full = build(Rows(2), tiny_bundle, tmp_path)
    fast = build(Rows(2), tiny_bundle, tmp_path, autocast=torch.bfloat16)
    assert fast.folder != full.folder
    a, b = full.read([0, 1], [0, 0]).mean, fast.read([0, 1], [0, 0]).mean
    assert 0 < (a - b).abs().mean() < 0.02 * a.abs().mean()


def test_rows_are_gathered_from_all_parts_in_any_order(tiny_bundle, tmp_path):
    cache = build(Rows(11, labels=True), tiny_bundle, tmp_path)
    places, variants = [9, 0, 4, 4, 10, 3, 9], [0, 1, 0, 1, 1, 0, 1]
    together = cache.read(places, variants)
    for i, (place, variant) in enumerate(zip(places, variants, strict=True)):
        alone = cache.read([place], [variant])
        assert torch.equal(together.mean[i], alone.mean[0]) and torch.equal(together.std[i], alone.std[0])
    assert cache.rows == list(range(11)) and cache.ids[10] == "row 10"
    assert cache.instructions[4] == "make it 1" and cache.edited_captions[5] == "page 5, changed"
    assert cache.labels["edit"].tolist() == [[row, row % 3] for row in range(11)]
    with pytest.raises(IndexError, match="0 to 10"):
        cache.read([11], [0])
    assert cache.read([], []).before.shape == (0, 4, 8, 8)


def test_a_pickled_cache_reopens_its_files(tiny_bundle, tmp_path):
    cache = build(Rows(5), tiny_bundle, tmp_path)
    before = cache.read([4], [1]).mean
    sent = pickle.dumps(cache)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent).read([4], [1]).mean, before)


def test_a_second_build_reads_no_picture(tiny_bundle, tmp_path):
    build(Rows(5), tiny_bundle, tmp_path)

    def refuse(row):
        raise AssertionError("read again")

    assert len(build(Rows(5, on_read=refuse), tiny_bundle, tmp_path)) == 5


@pytest.mark.parametrize("change", ["data", "transform", "dtype"])
def test_a_different_source_transform_or_dtype_uses_a_separate_cache(tiny_bundle, tmp_path, change):
    first = build(Rows(2), tiny_bundle, tmp_path)
    rows = Rows(3 if change == "data" else 2)
    transform = Transform(size=(32, 32), flip=False) if change == "transform" else SQUARE
    other = build(rows, tiny_bundle, tmp_path, transform, dtype="fp16" if change == "dtype" else "fp32")
    assert first.folder != other.folder


def test_worker_processes_give_the_same_bytes(tiny_bundle, tmp_path):
    broken = [3, 8, 9, 10, 11]  # the third part has no usable row
    for folder, workers in ((tmp_path / "here", 0), (tmp_path / "there", 2)):
        child = Child(
            lambda f=folder, w=workers: build(
                Rows(14, broken=broken), tiny_bundle, f, workers=w, max_broken=0.5
            )
        )
        assert child.end() == 0
    assert files(tmp_path / "here") == files(tmp_path / "there")
    cache = LatentCache(home(tmp_path / "there"))
    assert cache.rows == [0, 1, 2, 4, 5, 6, 7, 12, 13]
    assert cache.read([8, 6], [0, 0]).mean.isfinite().all()


# --- several processes, killed processes -----------------------------------------------------------


def test_two_processes_build_the_same_cache_together_byte_for_byte(tiny_bundle, tmp_path):
    assert Child(lambda: build(Rows(22), tiny_bundle, tmp_path / "one")).end() == 0
    ready_read, ready_write = os.pipe()
    resume_read, resume_write = os.pipe()

    def second():
        # Neither builds all of it: this one waits within its first part until the other is done.
        def wait(row):
            if row == 5:
                os.write(ready_write, b"x")
                os.read(resume_read, 1)

        build(Rows(22, on_read=wait), tiny_bundle, tmp_path / "two", rank=1, world=2)

    slow = Child(second)
    os.read(ready_read, 1)
    messages: list[str] = []

    def first():
        def notify(text):
            messages.append(text)
            os.write(resume_write, b"x")

        build(Rows(22), tiny_bundle, tmp_path / "two", rank=0, world=2, say=notify)
        assert ["another process" in text for text in messages] == [True]

    quick = Child(first)
    assert quick.end() == 0 and slow.end() == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def die_at(point: str) -> None:
    """Kill this process with SIGKILL at a point of building the second part."""
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    append, rename = Ledger.append, os.replace
    if point == "written":
        os.replace = lambda a, b: kill() if "000001." in str(b) else rename(a, b)
    elif point == "renamed":
        Ledger.append = lambda self, line: kill() if line["part"] == 1 else append(self, line)
    elif point == "half a line":

        def half(self, line):
            append(self, line)
            if line["part"] == 1:
                path = self.folder / "manifest.jsonl"
                os.truncate(path, path.stat().st_size - 20)
                kill()

        Ledger.append = half


@pytest.mark.parametrize("point", ["reading", "written", "renamed", "half a line"])
def test_a_killed_build_resumes_with_the_missing_rows(tiny_bundle, tmp_path, point):
    assert Child(lambda: build(Rows(10), tiny_bundle, tmp_path / "whole")).end() == 0
    folder = tmp_path / "killed"

    def work():
        die_at(point)
        stop = (
            (lambda row: os.kill(os.getpid(), signal.SIGKILL) if row == 6 else None)
            if point == "reading"
            else None
        )
        build(Rows(10, on_read=stop), tiny_bundle, folder)

    assert Child(work).end() == -signal.SIGKILL
    kept = inodes(folder)["000000.latents"]
    read: list[int] = []
    read_fd, write_fd = os.pipe()

    def resume():
        build(Rows(10, on_read=read.append), tiny_bundle, folder)
        os.write(write_fd, json.dumps(read).encode())

    assert Child(resume).end() == 0
    assert json.loads(os.read(read_fd, 1000)) == list(range(4, 10))
    assert inodes(folder)["000000.latents"] == kept
    found = {path.name: path.read_bytes() for path in folder.glob("*/*.latents")}
    assert found == {name: data for name, data in files(tmp_path / "whole").items() if "line" not in name}
    assert not list(folder.glob("*/.0*")), "no half-written file is left"
    LatentCache(home(folder))


def test_a_killed_process_releases_its_claim(tiny_bundle, tmp_path):
    ready_read, ready_write = os.pipe()

    def hang(row):
        os.write(ready_write, b"x")
        signal.pause()

    child = Child(lambda: build(Rows(3, on_read=hang), tiny_bundle, tmp_path))
    os.read(ready_read, 1)
    messages: list[str] = []

    def say(text):
        messages.append(text)
        os.kill(child.pid, signal.SIGKILL)
        child.end()

    assert len(build(Rows(3), tiny_bundle, tmp_path, say=say)) == 3
    assert len(messages) == 1 and "another process" in messages[0]


def test_the_workers_of_a_killed_process_exit(tiny_bundle, tmp_path):
    ready_read, ready_write = os.pipe()
    read_end, write_end = os.pipe()

    def hang(*_):  # the first chunk has arrived, and nothing reads the next ones
        signal.pause()

    def notify(row):
        if row == 10:  # the previous chunk is being sent, and is larger than a pipe
            os.write(ready_write, b"x")

    def work():
        large = Transform(size=(64, 64))
        caches._encode = hang
        build(Rows(16, side=64, on_read=notify), tiny_bundle, tmp_path, large, workers=1)

    child = Child(work)
    os.close(write_end)
    os.read(ready_read, 1)
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    ended, _, _ = select.select([read_end], [], [], 30)
    assert ended and os.read(read_end, 1) == b"", "the last holder of the pipe has gone"


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_part_is_reported_and_recreated(tiny_bundle, tmp_path, damage):
    build(Rows(10), tiny_bundle, tmp_path)
    original, kept = files(tmp_path), inodes(tmp_path)
    path = home(tmp_path) / "000001.latents"
    os.truncate(path, 1000) if damage == "cut short" else path.unlink()
    with pytest.raises(InputError, match="1 of 3 parts of .* are missing"):
        LatentCache(home(tmp_path), lambda _: None)
    messages: list[str] = []
    cache = build(Rows(10), tiny_bundle, tmp_path, say=messages.append)
    assert len(messages) == 1 and "000001.latents" in messages[0] and "recreating it" in messages[0]
    assert len(cache) == 10 and path.read_bytes() == original["000001.latents"]
    now = inodes(tmp_path)
    assert all(now[name] == kept[name] for name in ("000000.latents", "000002.latents"))


def test_a_failed_write_keeps_the_committed_parts(tiny_bundle, tmp_path):
    read_fd, write_fd = os.pipe()

    def work():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def fill_the_disk(row):
            if row == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))

        try:
            build(Rows(10, on_read=fill_the_disk), tiny_bundle, tmp_path)
        except OSError as error:
            os.write(write_fd, f"{error.errno} {error.filename}".encode())

    assert Child(work).end() == 0
    number, name = os.read(read_fd, 1000).decode().split()
    assert int(number) == errno.EFBIG and name.endswith("000001.latents")
    assert sorted(path.name for path in home(tmp_path).glob("*0*")) == ["000000.latents"]
    read: list[int] = []
    assert len(build(Rows(10, on_read=read.append), tiny_bundle, tmp_path)) == 10
    assert read == list(range(4, 10))


def test_too_little_disk_space_is_refused_before_any_work(tiny_bundle, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: usage(10_000))
    with pytest.raises(ResourceError, match="Free some space, or use --cache"):
        build(Rows(10, on_read=lambda row: pytest.fail("read")), tiny_bundle, tmp_path)


def test_an_interrupted_build_keeps_its_complete_parts(tiny_bundle, tmp_path):
    read: list[int] = []

    def interrupt(row):
        if row == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Rows(10, on_read=interrupt), tiny_bundle, tmp_path)
    assert len(build(Rows(10, on_read=read.append), tiny_bundle, tmp_path)) == 10
    assert read == list(range(4, 10))


# --- rows that cannot be used ----------------------------------------------------------------------


def test_broken_rows_are_skipped_and_listed(tiny_bundle, tmp_path):
    cache = build(Rows(10, broken=[2, 7]), tiny_bundle, tmp_path, max_broken=0.2)
    assert cache.rows == [0, 1, 3, 4, 5, 6, 8, 9] and cache.ids[2] == "row 3"
    assert cache.broken == [("row 2", "it is broken on purpose"), ("row 7", "it is broken on purpose")]
    lines = [json.loads(line) for line in (cache.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == cache.broken
    got = cache.read([2], [0]).before
    mean, _ = encode_pictures(tiny_bundle.vae, SQUARE(Rows(4)[3], 0)[0][None])
    torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-5)


def test_too_many_broken_rows_stop_the_build_and_are_named(tiny_bundle, tmp_path):
    read: list[int] = []
    rows = Rows(100, broken=[1, 2, 90], on_read=read.append)
    with pytest.raises(InputError, match=r"2 of 100 rows of rows are broken, more than 1%: row 1: .*row 2: "):
        build(rows, tiny_bundle, tmp_path)
    assert max(read) < 10, "no work after it is known"
    # One in a hundred is allowed.
    assert len(build(Rows(100, broken=[5]), tiny_bundle, tmp_path)) == 99


def test_endless_and_empty_data_are_refused(tiny_bundle, tmp_path):
    endless = Rows(2**31)
    endless.endless = True
    with pytest.raises(InputError, match="is endless"):
        build(endless, tiny_bundle, tmp_path)
    with pytest.raises(InputError, match="no rows"):
        build(Rows(0), tiny_bundle, tmp_path)


def test_an_autoencoder_that_outputs_nan_is_refused(tiny_model_dir, tmp_path):
    from ip2p.models.bundle import load_bundle

    bundle = load_bundle(tiny_model_dir)
    bundle.vae.encoder.conv_in.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="row 0"):
        build(Rows(2), bundle, tmp_path)


# --- keys ------------------------------------------------------------------------------------------


def test_a_networks_key_depends_on_its_weights_their_positions_and_its_config(tiny_model_dir):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_model_dir / "vae")
    key = weights_key(vae)
    assert key == weights_key(AutoencoderKL.from_pretrained(tiny_model_dir / "vae"))
    assert key == weights_key(vae.to(memory_format=torch.channels_last))
    weight = vae.encoder.conv_in.weight.data
    kept = weight.clone()
    weight[0, 0, 0, 0] += 1e-3
    assert weights_key(vae) != key
    weight.copy_(kept.flip(0))  # the same numbers elsewhere
    assert weights_key(vae) != key
    weight.copy_(kept)
    assert weights_key(vae) == key
    assert weights_key(vae.half()) != key
    vae.float().register_to_config(scaling_factor=0.5)
    assert weights_key(vae) != key


def test_the_text_key_depends_on_the_tokenizer_and_not_on_the_size(tiny_bundle, tiny_model_dir):
    from ip2p.models.bundle import load_bundle

    other = load_bundle(tiny_model_dir)
    assert text_key(other, (32, 32)) == text_key(tiny_bundle, (64, 64))
    other.tokenizer.add_tokens(["snowman"])
    assert text_key(other, (32, 32)) != text_key(tiny_bundle, (32, 32))


# --- texts -----------------------------------------------------------------------------------------


def test_texts_are_encoded_once_and_read_back(tiny_bundle, tmp_path):
    texts = [f"make it {number}" for number in (3, 1, 2, 3, 1, 9, 8, 7, 6)]
    encoded: list[str] = []

    def encode(chunk):
        encoded.extend(chunk)
        return Prompt(torch.cat([encode_prompt(tiny_bundle, text, (32, 32)).hidden for text in chunk]))

    cache = TextCache.build(texts, encode, tmp_path, key="k", batch=3, dtype="fp32", say=lambda _: None)
    assert sorted(encoded) == sorted(set(texts))
    order = ["make it 9", "make it 1", "make it 9", "make it 3"]
    got = cache.read(cache.places(order))
    assert got.pooled is None and got.time_ids is None
    expected = torch.cat([encode_prompt(tiny_bundle, text, (32, 32)).hidden for text in order])
    torch.testing.assert_close(got.hidden, expected)
    encoded.clear()
    TextCache.build(reversed(texts), encode, tmp_path, key="k", batch=3, dtype="fp32")
    assert not encoded
    TextCache.build(texts, encode, tmp_path, key="another", batch=3, dtype="fp32")
    assert encoded
    with pytest.raises(KeyError):
        cache.places(["make it 77"])


def test_sdxl_texts_keep_their_pooled_embeddings_and_time_ids(tmp_path):
    def encode(chunk):
        numbers = torch.tensor([float(len(text)) for text in chunk])
        times = torch.tensor([[1024.0, 3001.0, 0, 0, 1024, 3001]])
        return Prompt(
            numbers.view(-1, 1, 1).expand(-1, 3, 5),
            numbers.view(-1, 1).expand(-1, 2) + 1,
            times.repeat(len(chunk), 1),
        )

    texts = ["a" * length for length in range(1, 11)]
    cache = TextCache.build(texts, encode, tmp_path, key="k", batch=4)
    got = pickle.loads(pickle.dumps(cache)).read(cache.places(["aaa", "a" * 10]))
    assert got.hidden.shape == (2, 3, 5) and got.hidden[:, 2, 4].tolist() == [3, 10]
    assert got.pooled.tolist() == [[4, 4], [11, 11]]
    assert got.time_ids.tolist() == [[1024, 3001, 0, 0, 1024, 3001]] * 2


def test_a_truncated_part_of_the_texts_is_rebuilt(tmp_path):
    def encode(chunk):
        return Prompt(torch.tensor([float(len(text)) for text in chunk]).view(-1, 1, 1))

    texts = ["a" * length for length in range(1, 11)]
    cache = TextCache.build(texts, encode, tmp_path, key="k")
    os.truncate(cache.folder / "000002.texts", 2)
    messages: list[str] = []
    cache = TextCache.build(texts, encode, tmp_path, key="k", say=messages.append)
    assert len(messages) == 1 and "000002.texts" in messages[0]
    assert cache.read([9, 0]).hidden.flatten().tolist() == [10, 1]
