"""The admin port answers only to names of this host: another site's page that resolves to it is turned away."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from starlette.responses import PlainTextResponse

from pagewire.admin import AdminSettings
from pagewire.cli import main
from pagewire.host_guard import HostGuard, host_name, host_names
from pagewire.up import passed_on, specs, up_fields
from protocol.service import EXIT_REFUSED, CannotRun
from tests.e2e.stack import stack
from tests.pagewire.test_cli import up_context


def answer(host: str, names: str = "") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(HostGuard(PlainTextResponse("figures"), host_names(names)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/metrics", headers={"Host": host})

    return asyncio.run(ask())


@pytest.mark.parametrize("host", ["127.0.0.1:8001", "127.8.8.8", "localhost:9", "LocalHost.", "pagewire.localhost:1", "[::1]:8001"])
def test_loopback_is_answered_under_each_of_its_names(host: str) -> None:
    assert answer(host).text == "figures"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8001", "localhost.evil.example", "10.0.0.1:8001", "[", "x@y", "::1"]
)
def test_other_names_are_refused_and_named(host: str) -> None:
    refused = answer(host)
    assert refused.status_code == 421
    assert f"in Host, {(host_name(host) or host)!r}: " in refused.json()["error"]["message"]
    assert "--admin-hosts" in refused.json()["error"]["message"]


def test_names_that_the_operator_gives_are_answered() -> None:
    for host in ("figures.example", "FIGURES.example.:443", "10.0.0.1:8001"):
        assert answer(host, "figures.example, 10.0.0.1").text == "figures"
    assert answer("evil.example", "figures.example").status_code == 421


def test_a_port_of_either_is_no_part_of_the_name() -> None:
    assert answer("figures.example:443", "figures.example:8001").text == "figures"
    assert "in Host, 'evil.example': name it" in answer("evil.example:8001").json()["error"]["message"]


@pytest.mark.parametrize("given", ["[2001:db8::1]", "2001:db8::1", "[2001:DB8:0::1]:8001"])
def test_an_address_has_one_spelling(given: str) -> None:
    assert answer("[2001:db8::1]:8001", given).text == "figures"


@pytest.mark.parametrize(
    "given", ["*", "http://figures.example", "figures example", "figures.example:web", "[figures]", "figures..example"]
)
def test_what_is_no_name_is_refused_with_the_flag(given: str, run_dir: Path) -> None:
    with pytest.raises(CannotRun, match=re.escape(f"--admin-hosts {given}: no name or address")):
        host_names(f"figures.example, {given}")
    for command, code in (("up", 2), ("admin", EXIT_REFUSED)):
        refused = CliRunner().invoke(main, [command, "--run-dir", str(run_dir), "--admin-hosts", given])
        assert refused.exit_code == code
        assert refused.output.count("\n") == 1
        assert f"--admin-hosts {given}: " in refused.output


def test_up_passes_the_names_on_to_the_admin_server_alone() -> None:
    context = up_context("--admin-hosts", "figures.example")
    assert "admin_hosts" in {field.name for field in up_fields()}
    assert passed_on(context, AdminSettings) == ("--admin-hosts", "figures.example")
    assert [spec.role for spec in specs(context, context.params, 7, 8) if "--admin-hosts" in spec.arguments] == ["admin"]


@pytest.mark.slow
def test_a_running_admin_server_is_guarded() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--admin-hosts", "figures.example")
        for path in ("/metrics", "/state", "/", "/nowhere"):
            assert httpx.get(made.admin + path, headers={"Host": "evil.example"}, timeout=60).status_code == 421
        assert httpx.post(f"{made.admin}/prompt", json={}, headers={"Host": "evil.example"}, timeout=60).status_code == 421
        assert httpx.get(f"{made.admin}/metrics", headers={"Host": "figures.example"}, timeout=60).status_code == 200
        assert httpx.get(f"{made.admin}/metrics", timeout=60).status_code == 200
