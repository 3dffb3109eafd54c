"""The interfaces keep to what their OpenAPI declares: schemathesis sends what it allows and what it does not.

More of it, at a running server:
st run http://localhost:7860/openapi.json --exclude-checks positive_data_acceptance

Rules between fields, and what only a model knows of a size, no schema can state: a request that breaks one is
refused though the schema allows it. So `positive_data_acceptance` is left out.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
from running import running

from ip2p.serve.options import ServeConfig

COMMAND = (
    *("--phases", "fuzzing", "--max-examples", "3", "--seed", "1"),
    *("--exclude-checks", "positive_data_acceptance", "--no-color"),
)


def test_a_method_that_an_address_does_not_take_is_405_with_those_it_takes():
    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        for path, operations in http.get("/openapi.json").json()["paths"].items():
            for method in {"get", "put", "post", "delete", "patch", "trace"} - set(operations):
                answer = http.request(method.upper(), path.format(id="x", number=0, name="x"))
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].lower().split(", ")) == set(operations)


def test_every_answer_is_a_declared_one(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": "contract_hooks",
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        "NO_PROXY": "*",
    }
    with running(ServeConfig(max_steps=2, max_count=2), queue=1000, per_client=1000) as server:
        ran = subprocess.run(
            [Path(sys.executable).with_name("st"), "run", f"{server.url}/openapi.json", *COMMAND],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=280,
        )
        assert server.service.stats().done > 0
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert "Tested: 25" in ran.stdout
