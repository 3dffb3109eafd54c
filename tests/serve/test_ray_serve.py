"""`ip2p serve --ray` with two replicas on a local Ray, started and stopped like an operator does."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from conftest import make_model
from PIL import Image

from ip2p.pictures.images import load_image, to_bytes

PATIENCE = 240  # seconds; Ray takes ten to start on an idle machine
PICTURE = to_bytes(Image.new("RGB", (64, 64), "red"))


def stat(pid):
    """The fields of /proc/PID/stat from the third on: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def descendants(pid):
    """The command line of each direct and indirect child process, by its id."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int(stat(entry.name)[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    commands = {}
    for each in found - {pid}:
        with contextlib.suppress(OSError):
            commands[each] = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return commands


def is_alive(pid):
    try:
        return stat(pid)[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid):
    """Processor time, user and system."""
    words = stat(pid)
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def replicas(process):
    return sorted(pid for pid, command in descendants(process.pid).items() if "ServeReplica" in command)


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process and URL."""
    folder = tmp_path_factory.mktemp("ray")
    model = make_model(folder / "fake")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", "--ray", "local", "--replicas", "2", "--join", "2", "--port", str(port)]
    arguments += ["--model", f"fake={model}", "--device", "cpu", "--max-steps", "1000"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    log = folder / "log"
    with open(log, "wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ip2p", *arguments],
            stdout=log_file,
            stderr=log_file,
            env=environment,
            cwd=folder,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readyz", timeout=2, trust_env=False).status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process, url
    finally:
        remaining = descendants(process.pid)
        process.kill()
        process.wait()
        for pid in remaining:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(PATIENCE + 200)
def test_two_replicas_serve_edits_survive_a_kill_and_stop_cleanly(server):
    """One test, because starting Ray takes as long as all of it."""
    process, url = server
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:

        def edit(steps, **more):
            fields = {"instruction": "make it night", "steps": str(steps), **more}
            return http.post("/v1/edits", files={"image": PICTURE}, data=fields)

        # Both replicas work, and the results are complete.
        began = {pid: cpu_seconds(pid) for pid in replicas(process)}
        assert len(began) == 2
        answers = []
        callers = [threading.Thread(target=lambda: answers.append(edit(60, count="2"))) for _ in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len(answers[0].json()["results"]) == 2 and answers[0].json()["results"][0]["settings"]
        assert all(cpu_seconds(pid) > began[pid] + 0.1 for pid in began)

        # A job is available by its id: its progress, its result, its file.
        job = edit(20, wait="false").json()
        within(60, lambda: http.get(job["url"]).json()["state"] == "done")
        record = http.get(job["url"]).json()
        assert record["step"] == record["steps"] == 20
        assert load_image(http.get(record["results"][0]["url"]).content).size == (64, 64)
        assert http.get(f"{job['url']}/results/0").status_code == 200

        # Only the replicas can check a request against the model; the error is the usual one.
        answer = edit(2, size="4096")
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "size"

        # A running edit can be stopped.
        job = edit(1000, wait="false").json()
        within(60, lambda: http.get(job["url"]).json()["step"] > 0)
        http.delete(job["url"])
        within(10, lambda: http.get(job["url"]).json()["state"] == "cancelled")

        # An edit whose replica is killed is completed by the other one.
        job = edit(400, wait="false").json()
        within(60, lambda: http.get(job["url"]).json()["step"] > 0)
        used = {pid: cpu_seconds(pid) for pid in replicas(process)}
        time.sleep(0.3)
        os.kill(max(used, key=lambda pid: cpu_seconds(pid) - used[pid]), signal.SIGKILL)
        within(100, lambda: http.get(job["url"]).json()["state"] == "done")

        # SIGTERM lets running edits finish and leaves no process behind.
        last = []
        caller = threading.Thread(target=lambda: last.append(edit(300)))
        caller.start()
        within(60, lambda: "ip2p_requests_running 1" in http.get("/metrics").text)
        started = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        caller.join()
        assert last[0].status_code == 200
    assert process.wait(60) == 0
    assert len(started) > 4
    within(30, lambda: not any(map(is_alive, started)))
