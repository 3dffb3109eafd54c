"""The table of the edit benchmark, without models; its runs are not tests."""

from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from benchmarks.speed import edit, peaks
from ip2p.base.devices import return_freed_memory


def contestant(name, seconds):
    return SimpleNamespace(name=name, from_start=1.0, wall={1: seconds}, cpu={1: seconds})


def test_a_slowdown_of_the_machine_cancels_out_within_a_pair():
    assert edit.compare_pairs([1.0, 10.0, 4.0], [2.0, 20.0, 8.0]) == (0.5, 0.5, 0.5)


def test_the_table_compares_each_row_with_the_first():
    rows = edit.results_table([contestant("a", [2.0, 4.0]), contestant("b", [1.0, 3.0])], [1]).splitlines()
    assert rows[0] == "|  | from start | 1 at once: s | CPU s | × a |"
    assert rows[2] == "| a | 1.0 s | 3 | 3 | 1.00 (1.00 to 1.00) |"
    assert rows[3] == "| b | 1.0 s | 2 | 2 | 0.62 (0.50 to 0.75) |"


def test_rounds_alternate_the_order_and_discard_the_first():
    calls = []
    contestants = [
        SimpleNamespace(edit=lambda count, note, name=name: calls.append((name, count, note)))
        for name in ("a", "b")
    ]
    edit.run_rounds(contestants, [4], 2)
    assert [name for name, _, _ in calls] == ["b", "a", "a", "b", "b", "a"]
    assert [note for _, _, note in calls] == [False, False, True, True, True, True]


def test_the_contestants_are_variants_of_ip2p_and_diffusers():
    ours = {"ip2p", "ip2p compiled", "ip2p distilled"}
    theirs = {"diffusers", "diffusers channels-last", "diffusers compiled"}
    assert set(edit.CONTESTANTS) == ours | theirs


def test_a_contestant_that_cannot_be_loaded_is_skipped(monkeypatch, capsys):
    def open_one(name, setup):
        if name == "b":
            raise SystemExit("b: no compiler")
        return name

    monkeypatch.setattr(edit, "Contestant", open_one)
    assert edit.open_contestants(["a", "b", "c"], None) == ["a", "c"]
    assert "left out: b: no compiler" in capsys.readouterr().err


def test_memory_mapped_weights_count_and_copies_do_not(tmp_path):
    save_file({"a": torch.ones(1000), "b": torch.ones(500)}, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    mapped = peaks.mapped_bytes(weights.values())
    assert mapped in (0, 6000)  # 0 where the library reads a file instead of mapping it
    assert peaks.mapped_bytes([weights["a"].clone(), *[weights["b"]][:mapped]]) == min(mapped, 2000)


def test_the_cpu_peak_includes_a_temporary_tensor():
    return_freed_memory()  # what earlier tests freed must not be returned within the block
    peak = peaks.Peak("cpu")
    with peak:
        torch.ones(50_000_000).sum()
    assert 190e6 < peak.bytes < 300e6
