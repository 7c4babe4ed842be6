"""What can happen in a run: the mixes of faults, requests and circumstances."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.simulation.network import Weather


@dataclass(frozen=True)
class Mix:
    """What happens in a run. Counts are of faults; they are spread over the first `seconds`."""

    name: str
    seconds: float = 3.2
    requests: int = 18
    frontends: int = 2
    workers: int = 2
    schedulers: int = 1
    rivals: bool = False  # all schedulers start as the only one would, each with a run directory of its own
    weather: Weather = field(default_factory=Weather)
    blocks: int = 64
    host_blocks: int = 0
    preemption: str = "auto"
    slots: int = 8
    step_tokens: int = 64
    credit: int = 0  # tokens that a frontend may have outstanding; 0: as many as the engine gives
    step_time: tuple[float, float] = (0.002, 0.01)
    worker_crashes: int = 0
    worker_back: tuple[float, float] = (0.1, 1.5)  # seconds until a dead one is started again
    scheduler_crashes: int = 0
    scheduler_back: tuple[float, float] = (0.1, 3.0)  # seconds until a dead one is started again
    frontend_crashes: int = 0
    pauses: int = 0
    pause: tuple[float, ...] = (0.3, 1.5, 4.0)  # seconds, one of them
    holds: int = 0
    hold: tuple[float, ...] = (0.3, 1.5, 3.0)  # seconds that a link's bytes are held
    held: tuple[str, ...] = ("worker", "frontend")  # whose links
    drains: int = 0  # workers that leave on purpose, each with a successor some time later
    rolls: int = 0  # services replaced on purpose: worker, frontend, scheduler in turn
    moves: int = 0  # clients that lose their connection to a living frontend, and go on at another
    leaving: float = 0.0  # share of the clients that leave early
    poison: str = ""  # what computing the poison token does to a worker
    poison_from: int = 0  # crash and hang: not before its request is computed up to this position
    scoring: bool = False  # some requests ask for log probabilities of their prompts, a few for nothing else
    forks: float = 0.2  # share of requests with n > 1
    stops: float = 0.2  # share of requests with a stop string
    prefixes: int = 3  # different ones, which requests share
    prefix: tuple[int, ...] = (0, 0, 9, 20)  # tokens that a request has of one

    @property
    def faultless(self) -> bool:
        """Whether nothing happens that may end a session."""
        faults = (self.worker_crashes, self.scheduler_crashes, self.frontend_crashes, self.pauses, self.holds, self.drains, self.rolls)
        return not any(faults) and not self.poison and self.schedulers == 1 and not self.weather.loss


LONG = (0.01, 0.05)  # seconds of a step, so that streams last long enough to be cut
ROUGH = Weather(loss=0.01, duplication=0.01, reordering=0.02)

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
            requests=24,
            worker_crashes=3,
            leaving=0.2,
            weather=ROUGH,
        ),
        Mix(
            "swaps, scheduler crashes",
            blocks=20,
            host_blocks=40,
            preemption="swap",
            slots=4,
            workers=1,
            requests=24,
            credit=6,  # so that many are preempted
            scheduler_crashes=3,
            scheduler_back=(0.1, 1.0),
        ),
        Mix(
            "swaps, poison raises",
            blocks=20,
            host_blocks=40,
            preemption="swap",
            slots=4,
            workers=1,
            requests=40,
            credit=6,
            poison="raise",
        ),
        Mix("link", weather=Weather(loss=0.02, duplication=0.02, reordering=0.05)),
        Mix("far", weather=Weather(delay=(0.005, 0.02))),
        Mix("slow steps", step_time=(0.05, 0.4), requests=10),
        Mix("clients leave", leaving=0.5),
        Mix("clients move", moves=10, frontends=3, scheduler_crashes=1, step_time=LONG),
        Mix("workers crash", worker_crashes=4),
        Mix("only worker crashes", worker_crashes=3, workers=1),
        Mix("scheduler crashes", scheduler_crashes=3),
        Mix("frontends crash", frontend_crashes=4, frontends=3, step_time=LONG),
        Mix("frontends crash, link", frontend_crashes=3, step_time=LONG, weather=ROUGH, worker_crashes=1),
        Mix("frontends and scheduler crash", frontend_crashes=3, frontends=3, scheduler_crashes=2, step_time=LONG),
        Mix("pauses", pauses=4),
        Mix("pauses, little credit", pauses=4, credit=12),
        Mix("cuts", holds=5),
        Mix("drains", drains=3, step_time=LONG),
        Mix("rolled", rolls=3, step_time=LONG),
        Mix("poison raises", poison="raise"),
        Mix("poison crashes", poison="crash", workers=3),
        Mix("poison hangs", poison="hang", workers=3),
        Mix("nan", poison="nan"),
        Mix("nan once", poison="nan_once"),
        Mix("prompt scores", scoring=True, worker_crashes=3, scheduler_crashes=1),
        Mix("prompt scores, small pool", scoring=True, blocks=20, slots=4, workers=1, leaving=0.2),
        Mix("prompt scores, swaps", scoring=True, blocks=20, host_blocks=30, preemption="swap", slots=4, workers=1),
        Mix("prompt scores, frontends crash", scoring=True, frontend_crashes=4, frontends=3, weather=Weather(loss=0.01, duplication=0.01)),
        Mix("prompt scores, nan", scoring=True, poison="nan"),
        Mix("prompt scores, raises", scoring=True, poison="raise"),
        Mix("standby", schedulers=2, scheduler_crashes=2),
        Mix("standby, pauses", schedulers=2, pauses=5),
        Mix("standby, long pauses", schedulers=2, pauses=4, pause=(1.5, 8.0)),
        Mix("two in charge at the start", schedulers=2, rivals=True, holds=2),
        Mix(
            "everything",
            seconds=6.0,
            step_time=LONG,
            weather=ROUGH,
            frontends=3,
            worker_crashes=2,
            scheduler_crashes=1,
            frontend_crashes=1,
            pauses=2,
            holds=2,
            drains=1,
            rolls=2,
            moves=2,
            leaving=0.2,
            blocks=24,
            host_blocks=24,
            preemption="swap",
            slots=4,
        ),
        Mix(
            "everything, standby and poison",
            seconds=6.0,
            step_time=LONG,
            weather=ROUGH,
            schedulers=2,
            frontends=3,
            worker_crashes=1,
            scheduler_crashes=1,
            frontend_crashes=1,
            pauses=2,
            holds=1,
            drains=1,
            moves=2,
            leaving=0.2,
            poison="raise",
        ),
    )
}
