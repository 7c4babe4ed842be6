"""Which scheduler is in charge (DESIGN §2, "Epochs choose among schedulers")."""

from __future__ import annotations

from math import inf

from protocol.messages import Hello
from protocol.times import Times
from scheduler_svc.epochs import Epochs, State

TIMES = Times()


def claims(start: int = 0):
    def claim(counter: int) -> int:
        nonlocal start
        start = 1 + max(start, counter)
        return start

    return claim


def hello(role: str = "worker", epoch: int = 0, live: bool = False, incarnation: int = 1) -> Hello:
    return Hello(role, "w", incarnation, 1, epoch=epoch, live=live)


def active(epoch_seen: int = 0, incarnation: int = 5) -> Epochs:
    epochs = Epochs(incarnation, epoch_seen, claims(epoch_seen >> 32), TIMES, 0.0)
    epochs.tick(TIMES.resync)
    assert epochs.state is State.ACTIVE
    return epochs


def test_a_scheduler_listens_for_the_resync_time_before_it_takes_charge() -> None:
    epochs = Epochs(5, 0, claims(), TIMES, 0.0)
    epochs.tick(TIMES.resync - 0.01)
    assert (epochs.state, epochs.epoch) == (State.RESYNC, 0)
    assert epochs.next_time() == TIMES.resync
    epochs.tick(TIMES.resync)
    assert (epochs.state, epochs.epoch >> 32) == (State.ACTIVE, 1)
    assert epochs.next_time() == inf


def test_its_epoch_lies_above_every_one_that_a_hello_or_the_run_directory_named() -> None:
    epochs = Epochs(5, 7 << 32, claims(7), TIMES, 0.0)
    epochs.hello(hello(epoch=9 << 32 | 3), 0.1)
    epochs.tick(TIMES.resync)
    assert epochs.epoch >> 32 == 10


def test_two_schedulers_that_claim_the_same_counter_differ() -> None:
    assert active(incarnation=5).epoch != active(incarnation=6).epoch


def test_a_live_session_elsewhere_makes_a_resyncing_scheduler_stand_by() -> None:
    epochs = Epochs(5, 0, claims(), TIMES, 0.0)
    epochs.hello(hello(epoch=3 << 32, live=True), 0.1)
    assert epochs.state is State.STANDBY
    epochs.tick(100.0)
    assert epochs.state is State.STANDBY  # no worker is without a scheduler


def test_an_active_scheduler_yields_to_a_higher_epoch_only() -> None:
    epochs = active()
    epochs.hello(hello(epoch=epochs.epoch), 2.0)
    epochs.stale(epochs.epoch - 1, 2.0)
    assert epochs.state is State.ACTIVE
    epochs.stale(epochs.epoch + 1, 2.0)
    assert epochs.state is State.STANDBY
    other = active()
    other.hello(hello(epoch=other.epoch + (1 << 32)), 2.0)
    assert other.state is State.STANDBY


def test_a_standby_takes_over_when_workers_have_long_been_alone() -> None:
    epochs = Epochs(5, 0, claims(), TIMES, 0.0, standby=True)
    epochs.hello(hello(epoch=4 << 32, live=True), 1.0)
    epochs.hello(hello(epoch=4 << 32, live=False), 2.0)
    epochs.tick(2.0 + TIMES.standby - 0.01)
    assert epochs.state is State.STANDBY
    epochs.tick(2.0 + TIMES.standby)
    assert epochs.state is State.RESYNC
    epochs.tick(2.0 + TIMES.standby + TIMES.resync)
    assert (epochs.state, epochs.epoch >> 32) == (State.ACTIVE, 5)


def test_a_standby_stays_as_long_as_anyone_has_a_live_session() -> None:
    epochs = Epochs(5, 0, claims(), TIMES, 0.0, standby=True)
    epochs.hello(hello(epoch=4 << 32, live=False, incarnation=1), 0.0)
    for second in range(20):
        epochs.hello(hello("frontend", epoch=4 << 32, live=True, incarnation=2), float(second))
        epochs.tick(float(second))
    assert epochs.state is State.STANDBY


def test_workers_heard_while_resyncing_are_remembered() -> None:
    epochs = Epochs(5, 0, claims(), TIMES, 0.0)
    epochs.hello(hello(incarnation=8), 0.1)
    epochs.hello(hello("frontend", incarnation=9), 0.1)
    assert epochs.resyncing == {8}
