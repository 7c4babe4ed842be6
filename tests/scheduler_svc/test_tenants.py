"""Tenants share what there is."""

from __future__ import annotations

from scheduler_svc.waiting import Shares
from tests.scheduler_svc.fake_frontend import Stream
from tests.scheduler_svc.play import Stage


def test_tenants_that_wait_share_the_tokens_whatever_their_number_of_requests() -> None:
    stage = Stage()
    stage.worker(slots=4)
    frontend = stage.frontend()
    streams: dict[str, list[Stream]] = {"few": [], "many": []}
    for i in range(110):
        tenant = "few" if i >= 100 else "many"
        streams[tenant].append(frontend.submit([i % 60] * 9, stage.now, max_tokens=6, stop=False, tenant=tenant))
    while not all(stream.complete for stream in streams["few"]):
        stage.turn()
    many = sum(stream.complete for stream in streams["many"])
    assert 6 <= many <= 15


def test_a_tenant_that_pauses_saves_nothing_up() -> None:
    shares = Shares()
    for tenant in "ab":
        shares.arrive(tenant)
    shares.charge("a", 500)
    shares.charge("b", 600)
    shares.leave("b")
    shares.charge("a", 5000)
    shares.arrive("b")
    assert shares.given("b") == 5500
