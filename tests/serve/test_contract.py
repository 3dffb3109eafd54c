"""The interfaces conform to their OpenAPI schema: schemathesis sends valid and invalid requests.

To test a running server more thoroughly:
st run http://localhost:7860/openapi.json --exclude-checks positive_data_acceptance

A schema cannot state rules between fields, or limits on a size that only the model knows: a request that
breaks one is refused although the schema allows it. So `positive_data_acceptance` is left out.
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


def test_an_unsupported_method_is_405_and_the_allow_header_lists_the_supported_ones():
    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        for path, operations in http.get("/openapi.json").json()["paths"].items():
            for method in {"get", "put", "post", "delete", "patch", "trace"} - set(operations):
                answer = http.request(method.upper(), path.format(id="x", number=0, name="x"))
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].lower().split(", ")) == set(operations)


def test_schemathesis_finds_no_violation_of_the_openapi_schema(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": "contract_hooks",
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        "NO_PROXY": "*",
    }
    with running(ServeConfig(max_steps=2, max_count=2), queue=1000, per_client=1000) as server:
        process = subprocess.run(
            [Path(sys.executable).with_name("st"), "run", f"{server.url}/openapi.json", *COMMAND],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=280,
        )
        paths = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()["paths"]
        assert server.service.stats().done > 0
    assert process.returncode == 0, process.stdout[-6000:]
    assert f"Tested: {sum(map(len, paths.values()))}" in process.stdout
