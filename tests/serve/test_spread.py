"""Edits by replicas that run in this process, including lost replicas."""

import asyncio
import pickle
import queue
import threading
from pathlib import Path

import pytest
from fakes import events_of, fake_editor
from PIL import Image, ImageChops
from running import until

from ip2p.base.errors import InputError, ModelError, ResourceError
from ip2p.cli.main import main
from ip2p.serve import app
from ip2p.serve.jobs import Stopped
from ip2p.serve.maker import LocalMaker
from ip2p.serve.options import ServeConfig
from ip2p.serve.queue import Draining
from ip2p.serve.requests import EditRequest
from ip2p.serve.service import Service
from ip2p.serve.spread import Lost, News, Replica, ReplicaMaker, portable, raise_error
from ip2p.settings import EditSettings, SettingError

PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


class Stream:
    """A replica's news as Ray passes it on: from its own event loop to a thread that waits for it."""

    def __init__(self, loop, replica, request, lost_after):
        self.received: queue.Queue[News | Exception | None] = queue.Queue()
        self.lost_after = lost_after
        self.task = asyncio.run_coroutine_threadsafe(self.pump(replica, request), loop)

    async def pump(self, replica, request):
        updates = replica.edit(request)
        try:
            async for news in updates:
                self.received.put(news)
                if self.lost_after is not None and news.step >= self.lost_after:
                    self.received.put(Lost("killed"))
                    return
            self.received.put(None)
        except asyncio.CancelledError:
            self.received.put(Stopped())
            raise
        finally:
            await updates.aclose()

    def __iter__(self):
        while (news := self.received.get()) is not None:
            if isinstance(news, Exception):
                raise news
            yield news

    def stop(self):
        self.task.cancel()


class LocalReplicas:
    """Replicas used in turn. lost: the step, if any, at which each of the next edits loses its replica."""

    def __init__(self, editors, **how):
        self.replicas = [
            Replica(lambda stack, e=e: Service(LocalMaker({"fake": e}, join=2), keep_seconds=1, **how))
            for e in editors
        ]
        self.lost: list[int | None] = []
        self.requests = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def edit(self, request):
        self.requests += 1
        replica = self.replicas[self.requests % len(self.replicas)]
        return Stream(self.loop, replica, request, self.lost.pop(0) if self.lost else None)

    def card(self, model):
        return asyncio.run_coroutine_threadsafe(self.replicas[0].card(model), self.loop).result()

    def close(self):
        for replica in self.replicas:
            replica.service.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture(scope="module")
def editors():
    return [fake_editor(0.0), fake_editor(0.0)]


@pytest.fixture
def here(editors):
    for editor in editors:
        editor.bundle.unet.seconds = 0.0
        editor.bundle.unet.rows.clear()
    replicas = LocalReplicas(editors)
    yield replicas
    replicas.close()


@pytest.fixture
def spread(here):
    with Service(ReplicaMaker(here, ["fake"], count=2, each=2)) as service:
        service.warm()
        yield service


def request(**more):
    fields = {name: more.pop(name) for name in ("seeds", "previews") if name in more}
    settings = EditSettings.read({"instruction": "make it night", "steps": 4, **more})
    return EditRequest(image=PICTURE, settings=settings, **fields)


def test_results_match_those_of_a_single_service(spread):
    edit_request = request(seeds=(3, 4), auto_mask=0.5, text_cfg=6.0)
    with Service(LocalMaker({"fake": fake_editor(0.0)}, join=2)) as alone:
        expected = alone.submit(edit_request, client="a")
        assert expected.wait(60)
    job = spread.submit(edit_request, client="a")
    assert job.wait(60) and job.state == "done" and (job.step, job.steps) == (8, 8)
    assert [each.seed for each in job.results] == [3, 4]
    for result, other in zip(job.results, expected.results, strict=True):
        assert ImageChops.difference(result.image, other.image).getextrema() == ((0, 0),) * 3
        assert result.image.info["parameters"] == other.image.info["parameters"]
        assert result.mask.tobytes() == other.mask.tobytes()


def test_one_queue_feeds_every_replica(spread, editors, here):
    for editor in editors:
        editor.bundle.unet.seconds = 0.05
    jobs = [spread.submit(request(), client=f"caller {k}") for k in range(8)]
    assert spread.stats().waiting + spread.stats().running == 8 and spread.stats().waiting >= 4
    assert all(job.wait(60) and job.state == "done" for job in jobs)
    assert all(editor.bundle.unet.rows for editor in editors)
    assert spread.stats().done == 8


def test_previews_and_steps_are_forwarded(spread, editors):
    for editor in editors:
        editor.bundle.unet.seconds = 0.02
    job = spread.submit(request(steps=8, previews=2), client="a")
    kinds = [event.kind for event in events_of(job)]
    assert "preview" in kinds and "step" in kinds and kinds[-1] == "done"
    assert job.previews[0] is not None


def test_a_stopped_edit_is_cancelled_on_its_replica(spread, editors, here):
    for editor in editors:
        editor.bundle.unet.seconds = 0.1
    job = spread.submit(request(steps=100), client="a")
    until(lambda: job.step >= 1)
    spread.cancel(job.id)
    assert job.wait(5) and job.state == "cancelled" and job.results == []
    until(lambda: not any(replica.service.stats().running for replica in here.replicas), 5)
    calls = [len(editor.bundle.unet.rows) for editor in editors]
    assert sum(calls) < 20
    assert sum(replica.service.stats().cancelled for replica in here.replicas) == 1


def test_a_stopped_edit_keeps_its_finished_results(spread, editors):
    for editor in editors:
        editor.bundle.unet.seconds = 0.05
    job = spread.submit(request(steps=10, seeds=(1, 2, 3, 4), auto_mask=0.5), client="a")
    until(lambda: len(job.results) == 2, 60)
    spread.cancel(job.id)
    assert job.wait(30) and job.state == "cancelled"
    assert [result.seed for result in job.results] == [1, 2] and all(result.mask for result in job.results)


def test_an_edit_whose_replica_is_lost_restarts_on_another(spread, here):
    here.lost = [2]
    job = spread.submit(request(), client="a")
    assert job.wait(60) and job.state == "done" and len(job.results) == 1
    assert here.requests == 2


def test_an_edit_that_loses_two_replicas_fails(spread, here):
    here.lost = [1, 1]
    job = spread.submit(request(), client="a")
    assert job.wait(60) and job.state == "failed" and isinstance(job.error, ResourceError)
    assert "2 replicas failed" in str(job.error)


def test_a_request_that_a_replica_refuses_names_its_field(spread):
    job = spread.submit(request(size=(4096, 4096)), client="a")
    assert job.wait(60) and isinstance(job.error, SettingError) and job.error.field == "size"
    with pytest.raises(SettingError, match="steps"):
        spread.submit(request(steps=10**9), client="a")


def test_the_service_is_ready_after_warming_and_can_be_drained(here):
    with Service(ReplicaMaker(here, ["fake"], count=2, each=2)) as service:
        assert not service.ready
        service.warm()
        assert service.ready and service.card() == here.replicas[0].service.card()
        job = service.submit(request(steps=20), client="a")
        until(lambda: job.state != "waiting")
        assert service.drain(60) and job.state == "done" and not service.ready
        with pytest.raises(Draining):
            service.submit(request(), client="a")


@pytest.mark.parametrize(
    "error", [InputError("a"), ModelError("b"), ResourceError("c"), SettingError("d", field="image")]
)
def test_errors_survive_pickling(error):
    with pytest.raises(type(error)) as caught:
        raise_error(pickle.loads(pickle.dumps(error)))
    assert str(caught.value) == str(error) and vars(caught.value) == vars(error)


def test_a_draining_replica_counts_as_lost():
    with pytest.raises(Lost):
        raise_error(pickle.loads(pickle.dumps(Draining("The server is shutting down."))))


def test_a_replica_reports_why_its_model_did_not_load(tmp_path):
    def build(stack):
        raise ModelError("no such model")

    error = asyncio.run(Replica(build).error())
    with pytest.raises(ModelError, match="no such model"):
        raise_error(error)


def test_replicas_get_absolute_paths_and_no_secrets(tmp_path, monkeypatch):
    (tmp_path / "editor").mkdir()
    monkeypatch.chdir(tmp_path)
    config = ServeConfig(model=("editor", "photo=some/model"), ray="", api_key_file=Path("keys"))
    portable_config = portable(config)
    assert portable_config.models() == {"editor": str(tmp_path / "editor"), "photo": "some/model"}
    assert portable_config.ray is None and portable_config.api_key_file is None


def test_without_ray_the_install_command_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["serve", "--ray", "--port", "0"]) == 2
    assert "pip install 'ip2p[ray]'" in capsys.readouterr().err


def test_replicas_without_ray_are_refused(capsys):
    assert main(["serve", "--replicas", "2"]) == 2
    assert "--replicas requires --ray" in capsys.readouterr().err


def test_a_config_without_ray_makes_an_in_process_service(tmp_path):
    import contextlib

    with contextlib.ExitStack() as stack:
        service = stack.enter_context(app.make_service(ServeConfig(store=tmp_path / "r"), stack))
        assert type(service) is Service
