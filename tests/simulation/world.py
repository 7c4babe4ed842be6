"""A whole deployment in one process, from one seed: services, network, clients, faults, and the rules they must keep.

`World(seed, mix).run()` raises `Broken` with the story of what happened when a rule does not hold.
"""

from __future__ import annotations

import gc
import random
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from frontend.entries import Entry, NewRequest
from gpu_worker.oracle import expected, expected_prompt_logprobs
from gpu_worker.settings import WorkerSettings
from protocol.columns import pack, unpack
from protocol.messages import SamplingParams
from protocol.times import Times
from scheduler_svc.settings import SchedulerSettings
from tests.simulation.clock import Clock
from tests.simulation.network import Network, Weather
from tests.simulation.nodes import FrontendNode, SchedulerNode, WorkerNode

RUN_DIR = Path("/nonexistent")
EOS = 256
POISON = 7  # a token id that no oracle stream holds


class Broken(AssertionError):
    """A rule was broken; the text ends with the last events."""


@dataclass(frozen=True)
class Mix:
    """What happens in a run. Counts are of faults; they are spread over the first `seconds`."""

    name: str
    seconds: float = 4.0
    requests: int = 24
    frontends: int = 2
    workers: int = 2
    schedulers: int = 1
    weather: Weather = field(default_factory=Weather)
    blocks: int = 64
    host_blocks: int = 0
    preemption: str = "auto"
    slots: int = 8
    step_time: tuple[float, float] = (0.002, 0.01)
    worker_crashes: int = 0
    scheduler_crashes: int = 0
    frontend_crashes: int = 0
    pauses: int = 0
    pause: tuple[float, ...] = (0.3, 1.5, 4.0)  # seconds, one of them
    holds: int = 0
    leaving: float = 0.0  # share of the clients that leave early
    poison: str = ""  # what computing the poison token does to a worker
    scoring: bool = False  # some requests ask for log probabilities of their prompts, a few for nothing else
    forks: float = 0.2  # share of requests with n > 1
    prefixes: int = 3  # different ones, which requests share
    prefix: tuple[int, ...] = (0, 0, 9, 20)  # tokens that a request has of one


MIXES = {
    mix.name: mix
    for mix in (
        Mix("calm"),
        Mix("small pool", blocks=20, slots=4, workers=1),
        Mix("swaps", blocks=20, host_blocks=30, preemption="swap", slots=4, workers=1),
        Mix(
            "swaps, workers crash",
            blocks=20,
            host_blocks=16,
            preemption="swap",
            slots=4,
            workers=1,
            requests=48,
            worker_crashes=3,
            leaving=0.2,
            weather=Weather(loss=0.01, duplication=0.01, reordering=0.02),
        ),
        Mix("link", weather=Weather(loss=0.02, duplication=0.02, reordering=0.05)),
        Mix("far", weather=Weather(delay=(0.005, 0.02))),
        Mix("slow steps", step_time=(0.05, 0.4), requests=10),
        Mix("clients leave", leaving=0.5),
        Mix("workers crash", worker_crashes=4),
        Mix("only worker crashes", worker_crashes=3, workers=1),
        Mix("scheduler crashes", scheduler_crashes=3),
        Mix("frontends crash", frontend_crashes=4, frontends=3),
        Mix("frontends crash, link", frontend_crashes=3, weather=Weather(loss=0.01, duplication=0.01, reordering=0.02), worker_crashes=1),
        Mix("pauses", pauses=4),
        Mix("cuts", holds=5),
        Mix("poison raises", poison="raise"),
        Mix("poison crashes", poison="crash", workers=3),
        Mix("poison hangs", poison="hang", workers=3),
        Mix("nan", poison="nan"),
        Mix("prompt scores", scoring=True, worker_crashes=3, scheduler_crashes=1),
        Mix("prompt scores, small pool", scoring=True, blocks=20, slots=4, workers=1, leaving=0.2),
        Mix("prompt scores, frontends crash", scoring=True, frontend_crashes=4, frontends=3, weather=Weather(loss=0.01, duplication=0.01)),
        Mix("prompt scores, nan", scoring=True, poison="nan"),
        Mix("prompt scores, raises", scoring=True, poison="raise"),
        Mix("standby", schedulers=2, scheduler_crashes=2),
        Mix("standby, pauses", schedulers=2, pauses=5),
        Mix("standby, long pauses", schedulers=2, pauses=4, pause=(1.5, 8.0)),
        Mix(
            "everything",
            weather=Weather(loss=0.01, duplication=0.01, reordering=0.02),
            worker_crashes=2,
            scheduler_crashes=1,
            pauses=2,
            holds=2,
            leaving=0.2,
            blocks=24,
            slots=4,
        ),
    )
}


@dataclass
class Client:
    """What one client asked for, what it should get, and what it has seen."""

    new: NewRequest
    streams: list[list[int]]
    poisoned: bool
    leaves_at: float
    entry: Entry
    frontend: FrontendNode
    ended: int = 0
    left: bool = False
    told: list[int] = field(default_factory=list)  # tokens of each choice that a dead frontend has told it


class World:
    """One run. Everything random comes from `seed`."""

    def __init__(self, seed: int, mix: Mix) -> None:
        self.seed = seed
        self.mix = mix
        self.rng = random.Random(f"{seed}/{mix.name}")
        self.clock = Clock()
        self.story: deque[str] = deque(maxlen=60)
        self.network = Network(self.clock, random.Random(f"{seed}/network"), mix.weather)
        self.times = replace(Times(), grace=3.0, hold=20.0, move=2.0)
        self.store: dict[str, object] = {}
        self.clients: list[Client] = []
        self._incarnations = 0
        self.resumed = 0  # streams that went on at another frontend
        self.names = [f"scheduler-{i}" for i in range(mix.schedulers)]
        self.schedulers: dict[str, SchedulerNode] = {}
        self.workers: dict[str, WorkerNode] = {}
        self.frontends: dict[str, FrontendNode] = {}
        for i, name in enumerate(self.names):
            self.start_scheduler(name, standby=i > 0)
        for i in range(mix.workers):
            self.start_worker(f"worker-{i}")
        for i in range(mix.frontends):
            self.start_frontend(f"frontend-{i}")
        self._arrange()

    # ------------------------------------------------------------ services

    def _incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def tell(self, what: str) -> None:
        """Add to the story."""
        self.story.append(f"{self.clock.now:9.4f} {what}")

    def start_scheduler(self, name: str, standby: bool = False) -> None:
        settings = SchedulerSettings(
            RUN_DIR, name, max_num_seqs=self.mix.slots, max_num_batched_tokens=64, preemption=self.mix.preemption, times=self.times
        )
        self.tell(f"{name} starts")
        rng = random.Random(f"{self.seed}/{name}/{self._incarnation()}")
        self.schedulers[name] = SchedulerNode(name, self.clock, self.network, settings, rng, self.store, standby)

    def start_worker(self, name: str) -> None:
        settings = WorkerSettings(
            RUN_DIR,
            name,
            runner="oracle",
            block_size=4,
            num_gpu_blocks=self.mix.blocks,
            num_cpu_blocks=self.mix.host_blocks,
            max_num_seqs=self.mix.slots,
            max_num_batched_tokens=64,
            max_model_len=128,
        )
        self.tell(f"{name} starts")
        marks = {POISON: self.mix.poison} if self.mix.poison else {}
        self.workers[name] = WorkerNode(
            name,
            self.clock,
            self.network,
            self.names,
            self._incarnation(),
            self.times,
            settings,
            lambda: self.rng.uniform(*self.mix.step_time),
            marks,
            self._worker_died,
        )

    def start_frontend(self, name: str) -> None:
        self.tell(f"{name} starts")
        self.frontends[name] = FrontendNode(name, self.clock, self.network, self.names, self._incarnation(), self.times, self._touched)

    def _worker_died(self, node: WorkerNode) -> None:
        self.tell(f"{node.name} dies")
        node.crash()
        self.clock.after(self.rng.uniform(0.1, 1.5), lambda: self.start_worker(node.name))

    def _scheduler_died(self, name: str) -> None:
        self.tell(f"{name} dies")
        self.schedulers[name].crash()
        for peer in (*self.workers.values(), *self.frontends.values()):
            if self.rng.random() < 0.7:  # the others find out by silence
                self.clock.after(self.rng.uniform(0.0, 0.05), lambda peer=peer: peer.lose_connections(name))  # type: ignore[misc]
        self.clock.after(self.rng.uniform(0.1, 3.0), lambda: self.start_scheduler(name))

    # ------------------------------------------------------------ what happens, and when

    def _arrange(self) -> None:
        rng, mix = self.rng, self.mix
        for i in range(mix.requests):
            self.clock.at(rng.uniform(0.0, mix.seconds), lambda i=i: self._submit(i))  # type: ignore[misc]
        for _ in range(mix.worker_crashes):
            self.clock.at(rng.uniform(1.5, mix.seconds), self._crash_worker)
        for _ in range(mix.scheduler_crashes):
            self.clock.at(rng.uniform(1.5, mix.seconds), self._crash_scheduler)
        for _ in range(mix.frontend_crashes):
            self.clock.at(rng.uniform(1.0, mix.seconds), self._crash_frontend)
        for _ in range(mix.pauses):
            self.clock.at(rng.uniform(1.0, mix.seconds), self._pause)
        for _ in range(mix.holds):
            self.clock.at(rng.uniform(1.0, mix.seconds), self._hold)

    def _crash_worker(self) -> None:
        node = self.rng.choice(list(self.workers.values()))
        if node.alive:
            self._worker_died(node)

    def _crash_scheduler(self) -> None:
        name = self.rng.choice(self.names)
        if self.schedulers[name].alive:
            self._scheduler_died(name)

    def _crash_frontend(self) -> None:
        alive = [node for node in self.frontends.values() if node.alive]
        if len(alive) < 2:
            return
        node = self.rng.choice(alive)
        self.tell(f"{node.name} dies")
        node.crash()
        self.clock.after(self.rng.uniform(0.1, 2.0), lambda: self.start_frontend(node.name))
        for client in self.clients:
            if client.frontend is node and not client.ended:
                self.clock.after(self.rng.uniform(0.0, 1.0), lambda client=client: self._come_back(client))  # type: ignore[misc]

    def _come_back(self, client: Client) -> None:
        """A client whose frontend died asks another one: for the rest, or, having seen nothing, for all of it."""
        if client.ended:
            return
        node = client.frontend = self.rng.choice([node for node in self.frontends.values() if node.alive])
        if client.entry.choices and not client.entry.unscored:  # else that frontend had nothing to tell
            client.told = [max(len(choice.tokens), told) for choice, told in zip(client.entry.choices, client.told, strict=True)]
        if any(client.told):
            self.resumed += 1
            client.entry = node.attach(client.new.request, client.told)
        else:
            client.new = replace(client.new, request=self.rng.getrandbits(128).to_bytes(16, "little"))
            client.entry = node.submit(client.new)
            self._ended_at_once(client)

    def _pause(self) -> None:
        nodes = [*self.schedulers.values(), *self.workers.values(), *self.frontends.values()]
        node = self.rng.choice([n for n in nodes if n.alive])
        seconds = self.rng.choice(self.mix.pause)
        self.tell(f"{node.name} is stopped for {seconds} s")
        node.pause(seconds)
        if isinstance(node, SchedulerNode):
            self.network.stopped[node.name] = node.paused_until

    def _hold(self) -> None:
        peer = self.rng.choice([*self.workers, *self.frontends])
        scheduler = self.rng.choice(self.names)
        until = self.clock.now + self.rng.choice((0.3, 1.5, 3.0))
        ways = self.rng.choice((((peer, scheduler),), ((scheduler, peer),), ((peer, scheduler), (scheduler, peer))))
        self.tell(f"held until {until:.2f}: {ways}")
        for source, target in ways:
            self.network.hold(source, target, until)

    # ------------------------------------------------------------ clients

    def _submit(self, i: int) -> None:
        rng = self.rng
        poisoned = bool(self.mix.poison) and i % 8 == 3
        prefix = [97 + i % self.mix.prefixes] * rng.choice(self.mix.prefix)
        prompt = prefix + [rng.randrange(97, 123) for _ in range(rng.randrange(1, 30))]
        if poisoned:
            prompt[rng.randrange(len(prompt))] = POISON
        n = rng.choice((2, 3)) if rng.random() < self.mix.forks else 1
        params = SamplingParams(
            max_tokens=rng.randrange(1, 80 - len(prompt) if len(prompt) > 41 else 40),
            temperature=rng.choice((0.0, 1.0)),
            min_tokens=rng.choice((0, 0, 5)),
            stop_ids=pack([EOS] if rng.random() < 0.7 else []),
            logprobs=rng.choice((-1, -1, 2)),
        )
        if self.mix.scoring and i % 4 == 3:
            params = replace_params(params, prompt_logprobs=i % 3, max_tokens=0 if i % 16 in (7, 11) else params.max_tokens)
        params = replace_params(params, min_tokens=min(params.min_tokens, params.max_tokens))
        seeds = [rng.getrandbits(64) for _ in range(n)]
        new = NewRequest(rng.getrandbits(128).to_bytes(16, "little"), "oracle", pack(prompt), params, seeds)
        streams = [
            expected(prompt, seed, params.max_tokens, [EOS] if params.stop_ids else [], params.min_tokens, temperature=params.temperature)
            for seed in seeds
        ]
        leaves_at = self.clock.now + rng.uniform(0.0, 1.0) if rng.random() < self.mix.leaving else float("inf")
        node = rng.choice([node for node in self.frontends.values() if node.alive])

        def submit() -> None:
            entry = node.submit(new)
            client = Client(new, streams, poisoned, leaves_at, entry, node, told=[0] * n)
            self.clients.append(client)
            self._ended_at_once(client)
            if leaves_at < float("inf"):
                self.clock.at(leaves_at, lambda: client.frontend.run(lambda: self._leave(client.frontend, client)))

        node.run(submit)

    def _leave(self, node: FrontendNode, client: Client) -> None:
        if not client.ended:
            client.left = True
            client.ended += 1
            node.journal.done(client.entry, self.clock.now)
            node.turn()

    def _touched(self, node: FrontendNode, entry: Entry) -> None:
        client = next((c for c in self.clients if c.entry is entry), None)
        if client is None or entry.attaching:
            return
        for choice, told in zip(entry.choices, client.told, strict=bool(entry.choices)):
            if len(choice.tokens) < told:
                raise self.broken(f"choice {choice.index} of {entry.request.hex()[:8]} has {len(choice.tokens)} tokens, {told} were told")
        for choice, stream in zip(entry.choices, client.streams, strict=bool(entry.choices)):
            if choice.tokens != stream[: len(choice.tokens)]:
                raise self.broken(f"choice {choice.index} of {entry.request.hex()[:8]}: {choice.tokens} is no beginning of {stream}")
        self._check_scores(client)
        if entry.ended:
            client.ended += 1
            if client.ended > 1:
                raise self.broken(f"{entry.request.hex()[:8]} ended twice")
            self._judge(client)
            node.journal.done(entry, self.clock.now)

    def _ended_at_once(self, client: Client) -> None:
        """A request that asks for nothing had its news before its client listened."""
        if client.entry.ended:
            self._touched(client.frontend, client.entry)

    def _check_scores(self, client: Client) -> None:
        entry, params = client.entry, client.new.params
        if params.prompt_logprobs >= 0 and entry.error is None:
            owed = expected_prompt_logprobs(unpack(client.new.prompt).tolist(), params.prompt_logprobs)
            had = [list(zip(one.ids, one.values, strict=True)) for one in entry.scores]
            if had != owed[entry.scored - 1 - len(had) : entry.scored - 1]:
                raise self.broken(f"{entry.request.hex()[:8]}: {had} are no log probabilities before position {entry.scored} of {owed}")
            if len(had) < entry.scored - 1 and not any(client.told):
                raise self.broken(f"{entry.request.hex()[:8]} lacks log probabilities that nobody has told")

    def _judge(self, client: Client) -> None:
        entry = client.entry
        if client.poisoned:
            prompt = unpack(client.new.prompt).tolist()
            # the last token of a prompt that is only scored is computed by nobody
            computed = POISON in (prompt if client.new.params.max_tokens else prompt[:-1])
            if self.mix.poison == "nan" and computed and entry.error is None:
                raise self.broken("a request that computes NaN ended well")
            return
        if entry.error is not None:
            raise self.broken(f"{entry.request.hex()[:8]} failed: {entry.error}")
        for choice, stream in zip(entry.choices, client.streams, strict=True):
            if choice.tokens != stream:
                raise self.broken(f"choice {choice.index} ended at {len(choice.tokens)} of {len(stream)} tokens")
            wanted = "stop" if stream[-1:] == [EOS] and client.new.params.stop_ids else "length"
            if choice.finish_reason != wanted:
                raise self.broken(f"ended by {choice.finish_reason}, not {wanted}")

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Run until every client has its answer and the services are at rest, or raise Broken."""
        limit = self.mix.seconds + 60.0
        steps = 0
        while True:
            steps += 1
            if steps % 16 == 0:
                self._check()
            if self.clock.now > self.mix.seconds and len(self.clients) == self.mix.requests and all(c.ended for c in self.clients):
                break
            if self.clock.now > limit:
                late = [c.entry.request.hex()[:8] for c in self.clients if not c.ended]
                raise self.broken(f"{len(late)} of {len(self.clients)} requests have no end: {late}")
            self._step()
        self._settle()

    def _step(self) -> None:
        try:
            self.clock.step()
        except Broken:
            raise
        except AssertionError as error:
            raise self.broken(str(error)) from error

    def _check(self) -> None:
        for node in self.schedulers.values():
            if node.alive:
                try:
                    node.core.engine.check()
                except AssertionError as error:
                    raise self.broken(f"{node.name}: {error}") from error

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
            raise self.broken(f"{len(active)} schedulers are active")
        for node in self.schedulers.values():
            if node.alive and node is not active[0] and node.core.engine.ledger.requests:
                raise self.broken(f"{node.name} keeps {len(node.core.engine.ledger.requests)} requests, and is not in charge")
        stats = active[0].core.engine.stats()
        for name in ("requests_running", "requests_waiting", "blocks_used"):
            if stats[name]:
                raise self.broken(f"{name} is {stats[name]} at rest")

    def _at_rest(self) -> bool:
        alive = [node.core for node in self.schedulers.values() if node.alive]
        return [core.state for core in alive].count("active") == 1 and not any(core.engine.ledger.requests for core in alive)

    def happened(self) -> dict[str, int]:
        """What the run has been through: frames' fates, and the services' counters."""
        counts = {**self.network.seen, "resumed": self.resumed}
        for node in (*self.schedulers.values(), *self.workers.values(), *self.frontends.values()):
            counters = node.core.counters if isinstance(node, SchedulerNode) else node.counters
            for name, n in counters.items():
                counts[name] = counts.get(name, 0) + n
        return counts

    def broken(self, what: str) -> Broken:
        """The error that tells the whole story."""
        return Broken(f"seed {self.seed}, {self.mix.name}, at {self.clock.now:.4f}: {what}\n" + "\n".join(self.story))


def replace_params(params: SamplingParams, **changes: object) -> SamplingParams:
    """A copy with changes."""
    return msgspec.structs.replace(params, **changes)


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
