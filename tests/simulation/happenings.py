"""What happens to the services in the simulation, and when: crashes, pauses, held links, drains, rolling replacement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.frontend_node import FrontendNode
from tests.simulation.nodes import Node
from tests.simulation.scheduler_node import SchedulerNode
from tests.simulation.worker_node import WorkerNode

if TYPE_CHECKING:
    from tests.simulation.world import World


class Happenings:
    """Draws times and victims from the world's randomness."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng
        self._clock = world.clock
        self._mix = world.mix

    def arrange(self) -> None:
        """Set the time of everything that the mix has."""
        rng, mix = self._rng, self._mix
        for i in range(mix.requests):
            self._clock.at(rng.uniform(0.0, mix.seconds), lambda i=i: self._world.clients.submit(i))  # type: ignore[misc]
        for count, earliest, happens in (
            (mix.worker_crashes, 1.5, self._crash_worker),
            (mix.scheduler_crashes, 1.5, self._crash_scheduler),
            (mix.frontend_crashes, 1.0, self._crash_frontend),
            (mix.pauses, 1.0, self._pause),
            (mix.holds, 1.0, self._hold),
            (mix.drains, 1.5, self._drain),
            (mix.moves, 1.5, self._world.clients.move),
        ):
            for _ in range(count):
                self._clock.at(rng.uniform(earliest, mix.seconds), happens)
        rolls = (self._roll_worker, self._roll_frontend, self._roll_scheduler)
        for i in range(mix.rolls):
            self._clock.at(rng.uniform(1.5, mix.seconds), rolls[i % len(rolls)])

    def _crash_worker(self) -> None:
        alive = [node for node in self._world.workers.values() if node.alive]
        if alive:
            self._world.worker_died(self._rng.choice(alive))

    def _crash_scheduler(self) -> None:
        name = self._rng.choice(self._world.names)
        if self._world.schedulers[name].alive:
            self._world.scheduler_died(name, self._mix.scheduler_back)

    def _crash_frontend(self) -> None:
        alive = [node for node in self._world.frontends.values() if node.alive]
        if sum(not node.closed for node in alive) < 2:
            return
        node = self._rng.choice(alive)
        self._world.frontend_died(node)
        if not node.closed:
            self._clock.after(self._rng.uniform(0.1, 2.0), lambda: self._world.start_frontend(node.name))

    def _pause(self) -> None:
        nodes: list[Node] = [*self._world.schedulers.values(), *self._world.workers.values(), *self._world.frontends.values()]
        node = self._rng.choice([n for n in nodes if n.alive])
        seconds = self._rng.choice(self._mix.pause)
        self._world.tell(f"{node.name} is stopped for {seconds} s")
        node.pause(seconds)
        if isinstance(node, SchedulerNode):
            self._world.network.stopped[node.name] = node.paused_until
        elif isinstance(node, FrontendNode):
            self._world.clients.cut_off(node, seconds)

    def _hold(self) -> None:
        peers = (*self._world.workers.values(), *self._world.frontends.values())
        peer = self._rng.choice([peer for peer in peers if peer.alive and peer.role in self._mix.held])
        scheduler = self._rng.choice(self._world.names)
        seconds = self._rng.choice(self._mix.hold)
        there, back = (peer.name, scheduler), (scheduler, peer.name)
        ways = self._rng.choice(((there,), (back,), (there, back)))
        self._world.tell(f"held for {seconds} s: {ways}")
        for source, target in ways:
            self._world.network.hold(source, target, self._clock.now + seconds)
        if isinstance(peer, FrontendNode):
            self._world.clients.cut_off(peer, seconds)

    def _drain(self) -> None:
        """A worker leaves; a successor comes some time later, be the old one gone or waiting for it."""
        staying = [node for node in self._world.workers.values() if node.alive and not node.leaving]
        if staying:
            self._leave(self._rng.choice(staying))
            self._clock.after(self._rng.uniform(0.0, 1.5), self._world.new_worker)

    def _leave(self, node: WorkerNode) -> None:
        self._world.tell(f"{node.name} is drained")
        node.run(node.leave)

    def _roll_worker(self) -> None:
        staying = [node for node in self._world.workers.values() if node.alive and not node.leaving]
        if staying:
            node = self._rng.choice(staying)
            self._world.new_worker()
            self._clock.after(self._rng.uniform(0.5, 1.0), lambda: self._leave(node))

    def _roll_frontend(self) -> None:
        staying = [node for node in self._world.frontends.values() if node.alive and not node.closed]
        node = self._rng.choice(staying)
        self._world.new_frontend()
        self._world.tell(f"{node.name} takes nothing new")
        node.closed = True
        self._end_if_idle(node)

    def _end_if_idle(self, node: FrontendNode) -> None:
        """A frontend that takes nothing new ends with its last stream."""
        if not node.alive:
            return
        if any(client.frontend is node for client in self._world.clients.waiting):
            self._clock.after(0.2, lambda: self._end_if_idle(node))
        else:
            self._world.frontend_died(node)

    def _roll_scheduler(self) -> None:
        name = self._rng.choice(self._world.names)
        if self._world.schedulers[name].alive:
            self._world.scheduler_died(name, (0.2, 0.4))
