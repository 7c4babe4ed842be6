"""Bodies and parameters made from /openapi.json, valid and not: none finds a 5xx."""

from __future__ import annotations

import os
import re
import subprocess

import httpx
import pytest

from frontend.api.openapi import GETS, POSTS
from tests.contract.environments import environment
from tests.e2e.stack import stack

KEY = "schemathesis-key-0123456789"
EXAMPLES = 50  # of an operation, at most


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bodies_made_from_the_description_find_no_5xx() -> None:
    command = environment("schemathesis==4.32.5").with_name("schemathesis")
    with stack() as made:
        keys = made.folder / "keys"
        keys.write_text(f"contract {KEY}\n")
        # /ready is asked too: no scheduler shall seem lost because the machine stood still
        made.up("--runner", "oracle", "--max-model-len", "256", "--api-key-file", str(keys), "--times-factor", "10")
        arguments = ["--phases", "fuzzing", "--max-examples", str(EXAMPLES), "--seed", "20"]
        checks = ["--checks", "not_a_server_error", "--generation-database", "none", "--continue-on-failure", "--request-timeout", "60"]
        ended = subprocess.run(
            [
                str(command),
                "run",
                f"{made.url}/openapi.json",
                "--header",
                f"Authorization: Bearer {KEY}",
                *arguments,
                *checks,
                "--no-color",
            ],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=made.folder,
            env=os.environ | {"SCHEMATHESIS_REPORT": "0"},
        )
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        tested = re.search(r"Tested: (\d+)", ended.stdout)
        assert tested is not None, ended.stdout
        assert int(tested[1]) == len(POSTS) + len(GETS) - 1, ended.stdout  # the description itself is left out
        answer = httpx.post(
            f"{made.url}/generate", json={"prompt": "hi", "max_tokens": 3}, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        assert answer.status_code == 200
