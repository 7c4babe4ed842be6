"""Each link is cut or closed, in each way and for different times, or loses and repeats messages, or is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from benchmarks.tcp_proxy import TcpProxy
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, fleet, serving
from tests.faults.link_proxy import DOWN, UP, LinkProxy
from tests.faults.load import Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WAYS = ((UP,), (DOWN,), (UP, DOWN))
LINKS = {"frontend": ("frontend-0", "first"), "worker plans": ("worker-0", "first"), "worker results": ("worker-0", "results")}

# Down a results link come pings, and acknowledgements that plans carry as well: nobody needs that way. A worker notices its
# loss by the time to live of the last ping, unless an acknowledgement came behind that.
UNNOTICED = {"worker results": (DOWN,)}


class Proxied:
    """A fleet over TCP whose frontend-0 and worker-0 go through a proxy each; frontend-1 and worker-1 do not."""

    def __init__(self, running: Fleet) -> None:
        self.running = running
        self.proxies = {"frontend-0": LinkProxy(running.ports[0]), "worker-0": LinkProxy(running.ports[1])}
        running.scheduler()
        for name, proxy in self.proxies.items():
            start = running.frontend if name.startswith("frontend") else running.worker
            start(name, "--scheduler", f"tcp://127.0.0.1:{proxy.port}")
        running.worker("worker-1")
        running.frontend("frontend-1")
        running.ready(2)
        running.fresh()
        self.asked = 0  # requests so far

    def sessions_closed(self, name: str) -> float:
        """As last published."""
        return self.running.figure(name, "session_closed" if name.startswith("frontend") else "wire_session_closed")

    def load(self) -> Load:
        """Streams that none had before, well under way."""
        load = Load(self.running.urls, first=self.asked)
        load.well_underway()
        return load

    def whole(self) -> None:
        """Wait until every service says anew that it has its session."""
        running = self.running

        def open() -> bool:
            sessions = (running.sum("session_open", "frontend"), running.sum("worker_session_open", "worker"))
            return (*sessions, running.sum("workers_ready", "scheduler")) == (2, 2, 2)

        running.fresh()
        eventually(open)
        running.fresh()

    def ends_well(self, load: Load) -> None:
        load.finish()
        self.asked += len(load.seen)
        self.running.at_rest()
        self.whole()


def proxied(factor: float) -> Iterator[Proxied]:
    with fleet(tcp=True, factor=factor) as running:
        made = Proxied(running)
        try:
            yield made
        finally:
            for proxy in made.proxies.values():
                proxy.close()


@pytest.fixture(scope="module")
def links() -> Iterator[Proxied]:
    yield from proxied(1.0)


@pytest.fixture(scope="module")
def hasty_links() -> Iterator[Proxied]:
    """With all times at 0.3: the move time is 3 s."""
    yield from proxied(0.3)


def cut(made: Proxied, link: str, ways: tuple[str, ...], seconds: float) -> None:
    name, which = LINKS[link]
    proxy = made.proxies[name]
    held = proxy.held_bytes()
    proxy.hold(which, *ways)
    until = time.monotonic() + seconds
    eventually(lambda: proxy.held_bytes() > held)
    time.sleep(max(0.0, until - time.monotonic()))
    proxy.release()


def each_way_costs_a_session(made: Proxied, link: str, happens: Callable[[tuple[str, ...]], None], unless: tuple[str, ...] = ()) -> None:
    """Let something happen to a link one way, then the other, then both ways, under the same streams.

    unless: the ways of which it may go unnoticed, as long as the streams go on.
    """
    name, _ = LINKS[link]
    load = made.load()
    for ways in WAYS:
        closed = made.sessions_closed(name)
        happens(ways)
        if ways != unless:
            eventually(lambda closed=closed: made.sessions_closed(name) > closed)
        made.whole()
        assert load.streaming, f"{ways}: the streams have stopped"
    made.ends_well(load)


@pytest.mark.parametrize("link", LINKS)
def test_a_link_cut_for_a_moment_goes_unnoticed(links: Proxied, link: str) -> None:
    def moment(ways: tuple[str, ...]) -> None:
        cut(links, link, ways, 0.3)
        time.sleep(0.7)

    load = links.load()
    for ways in WAYS:
        links.running.costs_no_session(partial(moment, ways), LINKS[link][0])
    links.ends_well(load)


@pytest.mark.parametrize("link", LINKS)
def test_a_link_cut_for_two_seconds_costs_a_session_and_nothing_else(links: Proxied, link: str) -> None:
    each_way_costs_a_session(links, link, lambda ways: cut(links, link, ways, 2.0), UNNOTICED.get(link, ()))


@pytest.mark.parametrize("link", LINKS)
def test_a_link_cut_for_longer_than_the_move_time(hasty_links: Proxied, link: str) -> None:
    each_way_costs_a_session(hasty_links, link, lambda ways: cut(hasty_links, link, ways, 6.0), UNNOTICED.get(link, ()))


@pytest.mark.parametrize("link", LINKS)
def test_a_connection_is_closed_on_the_peers_side_the_schedulers_and_both(links: Proxied, link: str) -> None:
    name, which = LINKS[link]

    def close(halves: tuple[str, ...]) -> None:
        eventually(lambda: links.proxies[name].close_link(which, *halves) >= 1)  # one that is being renewed comes back

    each_way_costs_a_session(links, link, close)


def test_messages_are_dropped_repeated_and_reordered() -> None:
    with serving(env={"PAGEWIRE_CHAOS": "drop=0.01,dup=0.01,reorder=8,seed=1"}, frontends=2) as (running, load):
        time.sleep(5)
        # Sockets neither lose nor reorder anything: the shim did.
        for role, prefix in (("frontend", ""), ("scheduler", "wire_"), ("worker", "wire_")):
            for figure in ("link_resent", "link_duplicate", "link_reordered"):
                eventually(lambda role=role, figure=prefix + figure: running.total(figure, role) > 0)
        load.finish()
        running.at_rest()
        running.answered(load)


def test_links_are_slow_and_uneven() -> None:
    with fleet(tcp=True) as running:
        proxies = [TcpProxy(("127.0.0.1", port), delay=0.02, jitter=0.5) for port in running.ports]
        try:
            running.scheduler()
            for i in range(2):
                running.worker(f"worker-{i}", "--scheduler", f"tcp://127.0.0.1:{proxies[1].port}")
            running.frontend("frontend-0", "--scheduler", f"tcp://127.0.0.1:{proxies[0].port}")
            running.ready(2)
            load = Load(running.urls)
            load.well_underway()
            running.fresh()
            for name in ("frontend-0", "worker-0", "worker-1"):
                figure = "link_round_trip_seconds" if name == "frontend-0" else "worker_link_round_trip_seconds"
                assert running.figure(name, figure) >= 0.02, f"the link of {name} is not slow"
            running.costs_no_session(lambda: time.sleep(3))
            load.finish()
            running.at_rest()
            running.answered(load)
            assert all(proxy.up.passed and proxy.down.passed for proxy in proxies)
        finally:
            for proxy in proxies:
                proxy.close()
