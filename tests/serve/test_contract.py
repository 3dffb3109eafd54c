"""The interfaces keep to what their OpenAPI declares: schemathesis sends what it allows, and what it does not.

Rules between fields, and what only a model knows of a size, no schema can state: a request that breaks one is
refused though the schema allows it. So `positive_data_acceptance` is left out.
"""

import os
import subprocess
import sys
from pathlib import Path

from running import running

from ip2p.config import ServeConfig

COMMAND = (
    *("--phases", "coverage,fuzzing", "--max-examples", "3", "--max-time", "120", "--seed", "1"),
    *("--exclude-checks", "positive_data_acceptance", "--no-color"),
)


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
    assert "Tested: 21" in ran.stdout
