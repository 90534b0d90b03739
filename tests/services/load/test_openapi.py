"""Requests made from the service's own OpenAPI description: no crash, nothing undocumented, no hang.

schemathesis is not among the project's packages; uv runs it from a place of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.services.served import CLIENT, lab_serve

ROOT = Path(__file__).parents[3]
UV = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,unsupported_method"
)

pytestmark = [pytest.mark.load, pytest.mark.skipif(not Path(UV).exists(), reason="needs uv")]


def test_thousands_of_made_up_requests() -> None:
    with lab_serve(MAX_MODEL_LEN=512, MAX_QUEUE=1000, LOG_LEVEL="WARNING") as lab:
        lab.wait_ready()
        config = Path(__file__).with_name("schemathesis.toml")
        command = [UV, "tool", "run", "--from", "schemathesis==4.32.5", "st", "--config-file", str(config)]
        command += ["run", lab.url + "/openapi.json", "--phases=examples,coverage,fuzzing", "--seed=1"]
        command += [f"--checks={CHECKS}", "--max-examples=200", "--max-response-time=10", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        told = re.search(r"(\d+) generated.*", done.stdout)
        assert told, done.stdout + done.stderr
        print("\n" + told[0])
        assert done.returncode == 0, done.stdout
        assert int(told[1]) >= 2000
        health = CLIENT.get(lab.url + "/health").json()
        assert (health["status"], health["active_requests"]) == ("ok", 0)
