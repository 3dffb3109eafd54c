"""Hub data sets, with the hub replaced by a snapshot and by a local folder as file system."""

import pickle
import shutil
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from layouts import make_pairs, write_hub

from ip2p.base.errors import InputError, ModelError
from ip2p.data import hub
from ip2p.data.loading import open_source

NAME, COMMIT = "some/pairs", "c0ffee"
FILES = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def repository(tmp_path):
    """The data set as on the hub: two training files and one test file."""
    folder = tmp_path / "hub" / "datasets" / f"{NAME}@{COMMIT}"
    for number, file in enumerate(FILES):
        write_hub(folder / file, make_pairs(5)[2 * number : 2 * number + 2])
    return folder


@pytest.fixture
def api(monkeypatch, repository):
    """Replaces the hub's client; returns its calls."""
    calls = []

    def dataset_info(self, name, revision=None):
        calls.append(("info", name, revision))
        files = sorted(repository.rglob("*.*"))
        siblings = [SimpleNamespace(rfilename=f.relative_to(repository).as_posix()) for f in files]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return calls


@pytest.fixture
def cache(monkeypatch, repository, tmp_path):
    """Replaces `snapshot_download`: copies from the repository into a cache."""
    snapshot = tmp_path / "snapshots" / COMMIT
    downloaded = []

    def fetch(name, *, repo_type, revision, allow_patterns, local_files_only):
        assert repo_type == "dataset"
        if local_files_only:
            if not snapshot.is_dir():
                raise LocalEntryNotFoundError("not cached")
            return str(snapshot)
        for file in allow_patterns:
            downloaded.append(file)
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return downloaded


def test_the_files_of_the_split_are_downloaded_once(api, cache):
    source = open_source(NAME)
    assert cache == list(FILES[:2])
    assert [source[row].instruction for row in range(len(source))] == [
        f"make it number {number}" for number in range(4)
    ]
    assert source.key == f"{NAME}@{COMMIT}/train"
    open_source(NAME)
    assert len(cache) == 2 and len(api) == 1  # the second call did not need the hub


def test_an_incomplete_cache_is_completed(api, cache, repository, tmp_path):
    (tmp_path / "snapshots" / COMMIT / "data").mkdir(parents=True)
    shutil.copy(repository / FILES[0], tmp_path / "snapshots" / COMMIT / FILES[0])
    assert len(open_source(NAME)) == 4
    assert cache == list(FILES[:2])


def test_a_cached_data_set_opens_offline(api, cache, monkeypatch):
    open_source(NAME, split="test")
    asked = len(api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(open_source(NAME, split="test")) == 1
    assert len(api) == asked


@pytest.mark.parametrize(("revision", "flag"), [(None, ""), ("v1", " --revision v1")])
def test_an_uncached_data_set_offline_gives_the_download_command(cache, monkeypatch, revision, flag):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = rf"Download it: hf download --repo-type dataset some/pairs{flag} --include '\*.parquet'$"
    with pytest.raises(ModelError, match=command) as error:
        open_source(NAME, revision=revision)
    assert error.value.code == 3


def test_a_split_missing_from_the_cache_is_an_error_offline(api, cache, monkeypatch):
    open_source(NAME, split="test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not complete in the cache"):
        open_source(NAME)


def test_the_cache_is_read_from_hf_hub_cache(monkeypatch, tmp_path):
    # The real client with an empty cache.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hf download --repo-type dataset some/pairs"):
        open_source(NAME)
    snapshot = tmp_path / "datasets--some--pairs" / "snapshots" / COMMIT
    write_hub(snapshot / "train-00000-of-00001.parquet", make_pairs(2))
    refs = tmp_path / "datasets--some--pairs" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    source = open_source(NAME)
    assert len(source) == 2 and source.key == f"{NAME}@{COMMIT}/train"


def test_streaming_reads_row_groups_from_the_remote_files(api, monkeypatch, tmp_path):
    opened = []

    class Counting(DirFileSystem):
        def open(self, path, *rest, **more):
            opened.append(path)
            return super().open(path, *rest, **more)

    monkeypatch.setattr(hub, "filesystem", lambda: Counting(str(tmp_path / "hub"), fsspec.filesystem("file")))
    source = open_source(NAME, stream=True)
    paths = [f"datasets/{NAME}@{COMMIT}/{file}" for file in FILES[:2]]
    assert sorted(opened) == paths  # the footers
    assert source.blocks() == [range(0, 2), range(2, 4)]
    opened.clear()
    assert source[0].instruction == "make it number 0"
    assert source[1].before == make_pairs(2)[1].before
    assert opened == paths[:1]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3].instruction == "make it number 3"
    assert opened == paths  # a copy opens only the files it reads, and no footer again


def test_streaming_offline_gives_the_download_command(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be streamed: .*hf download --repo-type dataset some/pairs"):
        open_source(NAME, stream=True)


def test_a_lost_connection_is_not_a_broken_row(api, monkeypatch, tmp_path):
    local = DirFileSystem(str(tmp_path / "hub"), fsspec.filesystem("file"))
    monkeypatch.setattr(hub, "filesystem", lambda: local)
    source = open_source(NAME, stream=True)

    def gone():
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "filesystem", gone)
    with pytest.raises(
        ModelError, match=r"cannot be reached for the data set some/pairs \(ConnectionError\)"
    ):
        source[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError, "neither a local path nor a Hugging Face data set"),
        (RevisionNotFoundError, "has no revision v9"),
        (ConnectionError, r"\(ConnectionError\).*hf download --repo-type dataset some/pairs --revision v9"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_hub_errors_become_model_errors(cache, monkeypatch, error, words, stream):
    def refuse(self, name, revision=None):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ModelError, match=words):
        open_source(NAME, revision="v9", stream=stream)


def test_a_data_set_without_parquet_files_suggests_the_converted_revision(api, cache, repository):
    for file in FILES:
        (repository / file).rename((repository / file).with_suffix(".csv"))
    with pytest.raises(InputError, match="no parquet files; try .*--revision refs/convert/parquet"):
        open_source(NAME)


def test_an_unknown_split_is_reported_with_the_existing_ones(api, cache):
    with pytest.raises(InputError, match="has no split validation; it has test, train"):
        open_source(NAME, split="validation")
