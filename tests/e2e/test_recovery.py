"""A service is killed while clients stream; they see a pause, and every byte is the one that was computed."""

from __future__ import annotations

import time

import pytest

from tests.e2e.stack import Clients, Stack, eventually, mixed_bodies, stack, stream_completion

pytestmark = pytest.mark.slow

SLOW_ORACLE = {"PAGEWIRE_ORACLE_STEP_TIME": "0.02"}


def killed_amidst(made: Stack, *roles: str) -> None:
    """Kill services once the worker is well into streams, all of which end well. If they were over before, there are others."""

    def well_into(clients: Clients) -> bool:
        return made.metrics().get('pagewire_requests{name="frontend-0",status="running"}', 0) >= len(clients.bodies) / 2

    for _ in range(5):
        clients = Clients(made.url, mixed_bodies(12))
        eventually(lambda clients=clients: well_into(clients) or not clients.running)
        time.sleep(0.3)
        pids = [made.kill(role) for role in roles]
        amidst = clients.running
        clients.finish()
        for role, pid in zip(roles, pids, strict=True):
            assert made.service(role).pid != pid
        if amidst:
            return
    raise AssertionError("the streams were over before the fault, each time")


def at_rest(made: Stack) -> None:
    """No block is in use and no request is left once the clients are served."""
    quiet = ['pagewire_blocks{name="scheduler-0",state="used"}'] + [
        f'pagewire_requests{{name="frontend-0",status="{status}"}}' for status in ("waiting", "running")
    ]

    def resting() -> dict[str, float] | None:
        metrics = made.metrics()
        return metrics if all(metrics.get(name) == 0 for name in quiet) else None

    assert eventually(resting)['pagewire_requests{name="frontend-0",status="failed"}'] == 0


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_streams_survive_the_death_of_a(role: str) -> None:
    with stack() as made:
        made.up("--runner", "oracle", env=SLOW_ORACLE)
        killed_amidst(made, role)
        at_rest(made)


def test_streams_survive_the_death_of_worker_and_scheduler_together() -> None:
    with stack() as made:
        made.up("--runner", "oracle", env=SLOW_ORACLE)
        killed_amidst(made, "worker", "scheduler")
        at_rest(made)


def test_streams_survive_preemption() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--num-gpu-blocks", "40", "--max-model-len", "512", "--max-num-seqs", "8")
        # Short answers teach the scheduler to expect more of them, so that it admits more than will fit.
        Clients(made.url, mixed_bodies(24, max_tokens=8)).finish()
        Clients(made.url, [{**body, "ignore_eos": True} for body in mixed_bodies(16, max_tokens=400)]).finish()
        eventually(lambda: made.metrics().get('pagewire_scheduler_preemptions{name="scheduler-0"}', 0) > 0)
        at_rest(made)


def test_a_client_that_leaves_gives_its_blocks_back() -> None:
    import httpx

    with stack() as made:
        made.up("--runner", "oracle", env=SLOW_ORACLE)
        body = {"prompt": "x" * 64, "max_tokens": 3000, "ignore_eos": True, "stream": True, "seed": 1}
        with httpx.stream("POST", f"{made.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
        at_rest(made)
        after = stream_completion(made.url, {"prompt": "next", "max_tokens": 5, "seed": 1})
        assert after.error is None
