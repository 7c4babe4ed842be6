"""A scheduler in the simulation."""

from __future__ import annotations

import random

from protocol.listener import Route
from scheduler_svc.core import Core
from scheduler_svc.frontends import Frontends
from scheduler_svc.settings import SchedulerSettings
from tests.simulation.clock import Clock
from tests.simulation.network import Frames, Network
from tests.simulation.nodes import SOON, Node


class LittleCredit(Frontends):
    """Credit that stays as little as it is, though the engine reckons it anew within a turn."""

    little: int

    @property
    def limit(self) -> int:
        return self.little

    @limit.setter
    def limit(self, value: int) -> None:
        pass


class SchedulerNode(Node):
    """A scheduler: `Core` behind two virtual ROUTER sockets."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        settings: SchedulerSettings,
        rng: random.Random,
        store: dict[str, object],
        standby: bool = False,
        credit: int = 0,
    ) -> None:
        super().__init__(name, clock)
        self._network = network
        self._store = store
        self._credit = credit
        seen = int(store.get("epoch", 0))  # type: ignore[call-overload]
        key = store.get("key", b"")
        assert isinstance(key, bytes)
        self.core = Core(
            settings,
            lambda: rng.getrandbits(62) | 1,
            self._claim,
            self._keep_key,
            clock.now,
            seen_epoch=seen << 32,
            hash_key=key,
            standby=standby,
        )
        network.schedulers[name] = self._arrive
        network.gone[name] = lambda route: self.run(lambda: self._disconnected(route))
        self.turn()

    def _claim(self, counter: int) -> int:
        claimed = 1 + max(counter, int(self._store.get("epoch", 0)))  # type: ignore[call-overload]
        self._store["epoch"] = claimed
        return claimed

    def _keep_key(self, key: bytes) -> None:
        self._store["key"] = key

    def _arrive(self, route: Route, frames: Frames) -> None:
        def take() -> None:
            self.core.receive(route, frames, self.clock.now)
            self.turn()

        self.run(take)

    def _disconnected(self, route: Route) -> None:
        self.core.disconnected(route, self.clock.now)
        self.turn()

    def wake(self) -> None:
        self.turn()

    def turn(self) -> None:
        """What the service's loop does after each batch of messages."""
        frontends = self.core.engine.frontends
        if self._credit and not isinstance(frontends, LittleCredit):
            frontends.__class__ = LittleCredit
            frontends.little = self._credit
        self.core.turn(self.clock.now)
        lost = []
        while self.core.out:
            route, frames = self.core.out.popleft()
            if not self._network.to_peer(self.name, route, frames):
                lost.append(route)
        for route in lost:
            self.core.disconnected(route, self.clock.now)
        self.wake_at(max(self.core.next_time(), self.clock.now + SOON))

    def crash(self) -> None:
        self.alive = False
        del self._network.schedulers[self.name], self._network.gone[self.name]
        self._network.restart(self.name)
