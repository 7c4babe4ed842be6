"""Whatever is refused, stale, repeated or sent again is counted, and every counter is in /metrics by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zmq

from pagewire.metrics import Figures
from protocol.codec import Header, encode
from protocol.messages import PROTOCOL, Hello
from protocol.rundir import RunDir
from protocol.sessions import UNSEQUENCED
from protocol.telemetry import Telemetry
from tests.e2e.stack import eventually, stack
from tests.faults.load import Load

PACKAGES = {"frontend": ("", "frontend"), "scheduler": ("wire_", "scheduler_svc"), "worker": ("wire_", "gpu_worker")}
COUNTED = re.compile(r"counters\.add\(\"([a-z_]+)\"")


def counters(role: str) -> set[str]:
    """The figures of a service that are counters: its own and the protocol's, as it publishes them."""
    prefix, package = PACKAGES[role]
    files = [path for folder in (package, "protocol") for path in (Path(__file__).parents[2] / folder).rglob("*.py")]
    return {prefix + name for path in files for name in COUNTED.findall(path.read_text())}


@pytest.mark.parametrize("role", PACKAGES)
def test_each_counter_of_the_code_is_shown_by_its_name(role: str) -> None:
    names = counters(role)
    assert names >= {PACKAGES[role][0] + name for name in ("link_resent", "link_duplicate", "session_stale", "frame_bad")}
    figures = Figures()
    figures.take(Telemetry(role, "it", 1, 2, dict.fromkeys(names, 3.0)), 0.0)
    shown = figures.text([], 0.0).decode()
    missing = {name for name in names if f'pagewire_{role}_{name}{{name="it"}} 3.0' not in shown}
    assert not missing


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_bad_link_and_a_stranger_send_is_in_the_metrics() -> None:
    with stack() as made:
        made.up("--runner", "oracle", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.02", "PAGEWIRE_CHAOS": "drop=0.02,dup=0.02,reorder=8,seed=1"})
        load = Load({"up": made.url}, 8)
        load.well_underway()
        sockets = RunDir(made.run_dir)
        with zmq.Context() as context:
            for endpoint, role in ((sockets.frontends, "frontend"), (sockets.workers, "worker")):
                with context.socket(zmq.DEALER) as stranger:
                    stranger.setsockopt(zmq.LINGER, 60_000)  # ms
                    stranger.connect(endpoint)
                    for frames in (
                        [b"garbage"],
                        [encode(Header(4711, 1, 0)), b"\xc0"],
                        [UNSEQUENCED, encode(Hello(role, "stranger", 7, 1, protocol_oldest=PROTOCOL + 5, protocol=PROTOCOL + 6))],
                    ):
                        stranger.send_multipart(frames)
        wanted = {("scheduler", f"wire_{name}") for name in ("frame_bad", "session_stale", "session_refused")}
        for role, (prefix, _) in PACKAGES.items():
            wanted |= {(role, prefix + name) for name in ("link_resent", "link_duplicate", "link_reordered")}
        try:
            eventually(lambda: not missing(made.metrics(), wanted), 60)
        except AssertionError:
            raise AssertionError(f"not in /metrics, or 0: {missing(made.metrics(), wanted)}") from None
        load.finish()


def missing(metrics: dict[str, float], wanted: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of the (role, figure) that no service of the role shows above 0."""
    shown = {tuple(name.split("{")[0].removeprefix("pagewire_").split("_", 1)) for name, value in metrics.items() if value > 0}
    return wanted - shown
