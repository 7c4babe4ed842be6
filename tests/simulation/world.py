"""A whole deployment in one process, from one seed: services, network, clients, faults, and the rules they must keep.

`World(seed, mix).run()` raises `Broken` with the story of what happened when a rule does not hold.
"""

from __future__ import annotations

import gc
import random
import traceback
from collections import deque
from dataclasses import replace
from pathlib import Path

from gpu_worker.settings import WorkerSettings
from gpu_worker.slots import PlanError
from protocol.counters import Counters
from protocol.times import Times
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings
from tests.simulation.broken import ACCOUNTS, CHARGE, CRASH, CREDIT, LINK, MESSAGE, PLAN, PROGRESS, REST, Broken
from tests.simulation.clients import MOST_CHOICES, POISON, Clients, revive
from tests.simulation.clock import Clock
from tests.simulation.frontend_node import FrontendNode
from tests.simulation.happenings import Happenings
from tests.simulation.listed import check_listed
from tests.simulation.mixes import MIXES, Mix
from tests.simulation.network import Network
from tests.simulation.nodes import PeerNode
from tests.simulation.scheduler_node import SchedulerNode
from tests.simulation.worker_node import WorkerNode

RUN_DIR = Path("/nonexistent")
CHECKED_EVERY = 16  # events
TIMES = replace(Times(), grace=3.0, hold=20.0, move=2.0, progress=1.0)

# Counted where one side has sent what the other cannot use; nothing that happens here excuses that.
DEFECTS = (
    "frame_bad",
    "message_bad",
    "message_unexpected",
    "journal_gap",
    "journal_unexpected",
    "journal_exception",
    "scheduler_unexpected_message",
    "scheduler_resumed_miscounted",
    "scheduler_faults",
    "scheduler_workers_misbehaved",
)


class World:
    """One run. Everything random comes from `seed`."""

    def __init__(self, seed: int, mix: Mix, times: Times = TIMES) -> None:
        self.seed = seed
        self.mix = mix
        self.rng = random.Random(f"{seed}/{mix.name}")
        self.clock = Clock()
        self.story: deque[str] = deque(maxlen=60)
        self.network = Network(self.clock, random.Random(f"{seed}/network"), mix.weather)
        self.times = times
        self.counters = Counters()  # of processes that have ended
        self.clients = Clients(self, self.rng, mix, self.clock, self.times)
        self._incarnations = 0
        self._credit: dict[Engine, int] = {}  # the highest limit of each scheduler's engine
        self.names = [f"scheduler-{i}" for i in range(mix.schedulers)]
        self._stores: list[dict[str, object]] = [{} for _ in self.names] if mix.rivals else [{}] * mix.schedulers
        self.schedulers: dict[str, SchedulerNode] = {}
        self.workers: dict[str, WorkerNode] = {}
        self.frontends: dict[str, FrontendNode] = {}
        for i, name in enumerate(self.names):
            self.start_scheduler(name, standby=i > 0 and not mix.rivals)
        for _ in range(mix.workers):
            self.new_worker()
        for _ in range(mix.frontends):
            self.new_frontend()
        Happenings(self).arrange()

    # ------------------------------------------------------------ services

    def _incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def tell(self, what: str) -> None:
        """Add to the story."""
        self.story.append(f"{self.clock.now:9.4f} {what}")

    def start_scheduler(self, name: str, standby: bool = False) -> None:
        """Start a scheduler, for the first time or again."""
        settings = SchedulerSettings(
            RUN_DIR,
            name,
            max_num_seqs=self.mix.slots,
            max_num_batched_tokens=self.mix.step_tokens,
            preemption=self.mix.preemption,
            times=self.times,
        )
        self.tell(f"{name} starts")
        rng = random.Random(f"{self.seed}/{name}/{self._incarnation()}")
        store = self._stores[self.names.index(name)]
        self.schedulers[name] = SchedulerNode(name, self.clock, self.network, settings, rng, store, standby, self.mix.credit)

    def new_worker(self) -> None:
        """Start one more worker."""
        self.start_worker(f"worker-{len(self.workers)}")

    def start_worker(self, name: str) -> None:
        """Start a worker, for the first time or again."""
        settings = WorkerSettings(
            RUN_DIR,
            name,
            runner="oracle",
            block_size=4,
            num_gpu_blocks=self.mix.blocks,
            num_cpu_blocks=self.mix.host_blocks,
            max_num_seqs=self.mix.slots,
            max_num_batched_tokens=self.mix.step_tokens,
            max_model_len=128,
        )
        self.tell(f"{name} starts")
        self.workers[name] = WorkerNode(
            name,
            self.clock,
            self.network,
            self.names,
            self._incarnation(),
            self.times,
            settings,
            lambda: self.rng.uniform(*self.mix.step_time),
            self._marks(),
            self.mix.poison_from,
            self.worker_died,
            self._worker_left,
        )

    def _marks(self) -> dict[int, str]:
        """What computing a token does to a worker. A NaN that comes once is a fault of one device, at a common letter."""
        if self.mix.poison == "nan_once":
            return {} if self.workers else {97: "nan_once"}
        return {POISON: self.mix.poison} if self.mix.poison else {}

    def new_frontend(self) -> None:
        """Start one more frontend."""
        self.start_frontend(f"frontend-{len(self.frontends)}")

    def start_frontend(self, name: str) -> None:
        """Start a frontend, for the first time or again."""
        self.tell(f"{name} starts")
        self.frontends[name] = FrontendNode(
            name, self.clock, self.network, self.names, self._incarnation(), self.times, self.clients.touched, revive
        )

    def in_charge(self, engine: Engine) -> bool:
        """Whether this is the engine of the scheduler that everybody obeys, and lives."""
        alive = [node for node in self.schedulers.values() if node.alive]
        return max((n.core.epochs.epoch, n.core.engine is engine) for n in alive)[1] if alive else False

    def _retire(self, node: SchedulerNode | PeerNode) -> None:
        """The process has ended; what it counted stays."""
        for name, n in _counters(node).items():
            self.counters.add(name, n)

    # ------------------------------------------------------------ deaths

    def worker_died(self, node: WorkerNode) -> None:
        """A worker is killed, and started again unless it was leaving."""
        self.tell(f"{node.name} dies")
        node.crash()
        self._retire(node)
        if not node.leaving:
            self.clock.after(self.rng.uniform(*self.mix.worker_back), lambda: self.start_worker(node.name))

    def _worker_left(self, node: WorkerNode) -> None:
        self.tell(f"{node.name} has left")
        node.crash()
        self._retire(node)

    def scheduler_died(self, name: str, back: tuple[float, float]) -> None:
        """A scheduler is killed, and started again after `back` (earliest, latest) seconds."""
        self.tell(f"{name} dies")
        self.schedulers[name].crash()
        self._retire(self.schedulers[name])
        for peer in (*self.workers.values(), *self.frontends.values()):
            if self.rng.random() < 0.7:  # the others find out by silence
                self.clock.after(self.rng.uniform(0.0, 0.05), lambda peer=peer: peer.lose_connections(name))  # type: ignore[misc]
        self.clock.after(self.rng.uniform(*back), lambda: self.start_scheduler(name))

    def frontend_died(self, node: FrontendNode) -> None:
        """A frontend is killed."""
        self.tell(f"{node.name} dies")
        node.crash()
        self._retire(node)
        self.clients.frontend_died(node, [n.core.engine for n in self.schedulers.values() if n.alive])

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Run until every client has its answer and the services are at rest, or raise Broken."""
        limit = self.mix.seconds + 60.0
        steps = 0
        while True:
            steps += 1
            if steps % CHECKED_EVERY == 0:
                self._check()
            if self.clock.now > self.mix.seconds and len(self.clients.all) == self.mix.requests and not self.clients.waiting:
                break
            if self.clock.now > limit:
                late = [client.entry.request.hex()[:8] for client in self.clients.waiting]
                raise self.broken(PROGRESS, f"{len(late)} of {len(self.clients.all)} requests have no end: {late}")
            self._step()
        self._settle()

    def _step(self) -> None:
        try:
            self.clock.step()
        except Broken as broken:
            raise self.broken(broken.kind, broken.text) from broken
        except PlanError as error:
            raise self.broken(PLAN, str(error)) from error
        except AssertionError as error:
            raise self.broken(ACCOUNTS, str(error)) from error
        except Exception as error:
            raise self.broken(CRASH, repr(error)) from error

    def _check(self) -> None:
        for node in self.schedulers.values():
            if node.alive:
                engine = node.core.engine
                try:
                    engine.check()
                except AssertionError as error:
                    raise self.broken(ACCOUNTS, f"{node.name}: {error}") from error
                self._check_frontends(engine)

    def _check_frontends(self, engine: Engine) -> None:
        # what was sampled under a higher limit, before a worker was lost, stays outstanding
        limit = self._credit[engine] = max(engine.frontends.limit, self._credit.get(engine, 0))
        for frontend in engine.frontends.by_index:
            if frontend is None:
                continue
            # the row that takes the last token may be sampled for its forks too
            if frontend.in_flight + frontend.unsent > limit + MOST_CHOICES - 1:
                raise self.broken(CREDIT, f"{frontend.in_flight} + {frontend.unsent} tokens are outstanding for {frontend.name}")
            if frontend.session and frontend.resumed and any(f.requests for f in engine.frontends.mute(frontend.incarnation)):
                raise self.broken(REST, f"{frontend.name} has named everything, and has more")

    def _settle(self) -> None:
        """Nothing asks for anything any more: blocks and requests must all be given back."""
        until, quiet = self.clock.now + 8.0, self.clock.now + 8.0
        while self.clock.now < min(until, quiet + 1.0):
            self._step()
            if quiet > self.clock.now and self._at_rest():
                quiet = self.clock.now
        self._check()
        active = [n for n in self.schedulers.values() if n.alive and n.core.state == "active"]
        if len(active) != 1:
            raise self.broken(CHARGE, f"{len(active)} schedulers are active")
        for node in self.schedulers.values():
            if node.alive and node is not active[0] and node.core.engine.ledger.requests:
                raise self.broken(CHARGE, f"{node.name} keeps {len(node.core.engine.ledger.requests)} requests, and is not in charge")
        stats = active[0].core.engine.stats()
        for name in ("requests_running", "requests_waiting", "blocks_used", "host_blocks_used"):
            if stats[name]:
                raise self.broken(REST, f"{name} is {stats[name]} at rest")
        if kept := len(active[0].core.engine.ledger.requests):
            raise self.broken(REST, f"{kept} requests are kept at rest")
        try:
            check_listed(node for node in self.workers.values() if node.alive)
        except Broken as broken:
            raise self.broken(broken.kind, broken.text) from broken
        counts = self.happened()
        if wrong := {name: counts[name] for name in DEFECTS if counts.get(name)}:
            raise self.broken(MESSAGE, f"somebody sent what could not be used: {wrong}")
        if self.mix.faultless and counts.get("session_closed"):
            raise self.broken(LINK, f"{counts['session_closed']} sessions ended without a fault")

    def _at_rest(self) -> bool:
        alive = [node.core for node in self.schedulers.values() if node.alive]
        return [core.state for core in alive].count("active") == 1 and not any(core.engine.ledger.requests for core in alive)

    def happened(self) -> dict[str, int]:
        """What the run has been through: frames' fates, clients' ways, and the services' counters."""
        clients = self.clients
        counts = {**self.network.seen, "resumed": clients.resumed, "gone": clients.gone, **self.counters}
        for node in (*self.schedulers.values(), *self.workers.values(), *self.frontends.values()):
            if node.alive:
                for name, n in _counters(node).items():
                    counts[name] = counts.get(name, 0) + n
        return counts

    def broken(self, kind: str, what: str) -> Broken:
        """The error that tells the whole story."""
        return Broken(kind, f"seed {self.seed}, {self.mix.name}, at {self.clock.now:.4f}: {what}\n" + "\n".join(self.story))


def _counters(node: SchedulerNode | PeerNode) -> Counters:
    return node.core.counters if isinstance(node, SchedulerNode) else node.counters


def run_one(seed: int, name: str) -> tuple[int, str, str, dict[str, int]]:
    """Run one seed: (seed, mix, what went wrong or nothing, what happened)."""
    world = World(seed, MIXES[name])
    try:
        world.run()
    except Exception:
        return seed, name, traceback.format_exc(), {}
    finally:
        gc.collect()
    return seed, name, "", world.happened()


def collect_between_seeds() -> None:
    """Prepare a process that runs many seeds: garbage is collected between them, not in their midst."""
    gc.freeze()
    gc.disable()
