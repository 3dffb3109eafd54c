"""`launch` with a fake Ray: Ray itself is an extra, and takes a minute to start."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ip2p.base.errors import InputError, ModelError, ResourceError
from ip2p.training.ray import launch

CALLS: list[object] = []


def train(config: object) -> None:
    CALLS.append(config)
    if isinstance(config, Exception):
        raise config


class WorkersFailed(Exception):
    """Like Ray's: it contains what the workers raised."""

    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("Training failed\n  on rank 0.")
        self.worker_failures = failures


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Ray of one process; `trainers` are those created, `lost` is how many of them lose a worker."""
    CALLS.clear()
    fake = SimpleNamespace(trainers=[], lost=0, resources={"CPU": 4.0})

    class TorchTrainer:
        def __init__(self, work, *, scaling_config, run_config):
            self.work, self.scaling, self.run = work, scaling_config, run_config
            fake.trainers.append(self)

        def fit(self):
            if len(fake.trainers) <= fake.lost:
                raise WorkersFailed({1: RuntimeError("the machine is gone")})
            try:
                self.work()
            except Exception as error:
                raise WorkersFailed({0: error}) from None

    package = {
        "is_initialized": lambda: True,
        "cluster_resources": lambda: fake.resources,
    }
    parts = {
        "ray": package,
        "ray.train": {"RunConfig": SimpleNamespace, "ScalingConfig": SimpleNamespace},
        "ray.train.torch": {"TorchTrainer": TorchTrainer},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "1")
    return fake


def test_workers_call_the_function_in_the_current_folder(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch(train, "settings", workers=3, storage=Path("out/ray"))
    [trainer] = ray.trainers
    assert CALLS == ["settings"]
    assert (trainer.scaling.num_workers, trainer.scaling.use_gpu) == (3, False)
    assert trainer.run.storage_path == str(tmp_path / "out" / "ray")
    assert Path.cwd() == tmp_path
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


@pytest.mark.parametrize(("gpus", "wanted"), [(3, True), (2, False)])
def test_gpus_are_used_if_the_cluster_has_one_per_worker(ray, gpus, wanted):
    ray.resources["GPU"] = float(gpus)
    launch(train, "settings", workers=3)
    assert ray.trainers[0].scaling.use_gpu is wanted


def test_a_cluster_that_is_too_small_is_refused_before_the_start(ray):
    with pytest.raises(ResourceError, match="needs 5 CPUs, but the cluster has 4. Try --ray 4"):
        launch(train, "settings", workers=5)
    with pytest.raises(ResourceError, match="needs 2 GPUs, but the cluster has 0"):
        launch(train, "settings", workers=2, use_gpu=True)
    assert not ray.trainers


def test_an_error_of_the_package_is_raised_as_is_and_not_retried(ray):
    with pytest.raises(ModelError, match="takes 9 channels"):
        launch(train, ModelError("takes 9 channels"), workers=1)
    assert len(ray.trainers) == 1


def test_a_lost_worker_restarts_the_run_up_to_the_number_of_retries(ray, caplog):
    ray.lost = 2
    launch(train, "settings", workers=1, retries=2)
    assert len(ray.trainers) == 3
    assert CALLS == ["settings"]
    assert "resuming from the saved state" in caplog.text


def test_the_run_fails_after_the_last_retry(ray):
    ray.lost = 9
    with pytest.raises(ResourceError, match="failed 2 times, the last time with: on rank 0. The saved state"):
        launch(train, "settings", workers=1, retries=1)
    assert not CALLS


def test_without_ray_the_error_has_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[ray\]'"):
        launch(train, "settings", workers=1)
