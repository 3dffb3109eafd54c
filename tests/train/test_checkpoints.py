import torch

from ip2p.train.checkpoints import load_state, save_state


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "x.pt") == (None, None)


def test_newest_state_is_read(tmp_path):
    path = tmp_path / "deep" / "x.pt"
    for step in (1, 2):
        save_state({"step": step, "weights": torch.full((3,), float(step))}, path)
    state, warning = load_state(path)
    assert state["step"] == 2 and warning is None
    assert not list(tmp_path.rglob("*.part"))


def test_truncated_newest_falls_back_with_a_warning(tmp_path):
    path = tmp_path / "x.pt"
    for step in (1, 2):
        save_state({"step": step, "weights": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    state, warning = load_state(path)
    assert state["step"] == 1
    assert "x.pt cannot be read" in warning and "the one before" in warning


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"step": Evil()}, tmp_path / "x.pt")
    state, warning = load_state(tmp_path / "x.pt")
    assert state is None and warning
    assert not (tmp_path / "touched").exists()
