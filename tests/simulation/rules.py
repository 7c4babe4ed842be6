"""The rules of DESIGN §1 to §3 that a fault reaches, and where the simulation notices that one is switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from tests.simulation import rules_of_requests as requests
from tests.simulation import rules_of_steps as steps
from tests.simulation import rules_of_the_wire as wire
from tests.simulation.broken import ACCOUNTS, CHARGE, CREDIT, DRAIN, ENDING, LINK, MESSAGE, PLAN, PROGRESS, REST, STREAM
from tests.simulation.mixes import MIXES, Mix
from tests.simulation.network import Weather


@dataclass(frozen=True)
class Rule:
    """`off` switches it off; `mix` is where that is noticed, as a break of one of these kinds."""

    off: Callable[[pytest.MonkeyPatch], None]
    mix: Mix
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.off.__name__.replace("_", " ")


# More prefixes than the pool can hold: blocks are evicted, given away, and asked for again.
MANY_PREFIXES = replace(
    MIXES["scheduler crashes"],
    seconds=4.0,
    scheduler_crashes=6,
    blocks=24,
    slots=4,
    workers=1,
    requests=60,
    forks=0.0,
    prefixes=6,
    prefix=(20,),
)
ONE_PREFIX = replace(MIXES["nan once"], requests=40, prefixes=1, prefix=(20,))
MANY_DEATHS = replace(MIXES["frontends crash"], frontend_crashes=10)

RULES = (
    Rule(requests.a_choice_keeps_its_seed, MIXES["scheduler crashes"], (STREAM,)),
    Rule(requests.the_prompt_is_told_apart_from_known_tokens, MIXES["scheduler crashes"], (STREAM,)),
    Rule(requests.a_stop_string_beats_a_length, MIXES["calm"], (STREAM,)),
    Rule(requests.a_request_is_kept_until_its_frontend_is_done, MANY_DEATHS, (ENDING,)),
    Rule(wire.what_another_session_sent_is_dropped, MIXES["cuts"], (MESSAGE,)),
    Rule(wire.a_link_delivers_in_order_and_once, MIXES["link"], (PLAN,)),
    Rule(wire.what_is_not_acknowledged_is_sent_again, MIXES["link"], (PROGRESS,)),
    Rule(wire.silence_ends_a_session, MIXES["scheduler crashes"], (PROGRESS, ENDING)),
    Rule(wire.each_side_is_heard_in_time, MIXES["calm"], (LINK,)),
    Rule(wire.a_new_epoch_is_above_all_that_were_named, MIXES["scheduler crashes"], (ENDING, PROGRESS)),
    Rule(wire.a_lower_epoch_stands_by, MIXES["standby, long pauses"], (CHARGE,)),
    Rule(wire.who_stands_by_drops_everything, MIXES["standby, long pauses"], (CHARGE,)),
    Rule(wire.a_standby_takes_over, replace(MIXES["standby"], scheduler_crashes=1, scheduler_back=(1e3, 1e3)), (ENDING,)),
    Rule(wire.credit_bounds_what_is_outstanding, replace(MIXES["pauses, little credit"], credit=4), (CREDIT,)),
    Rule(wire.a_step_without_progress_ends_its_session, MIXES["poison hangs"], (PROGRESS,)),
    Rule(wire.a_lost_session_resets_the_worker, MIXES["scheduler crashes"], (PLAN,)),
    Rule(wire.an_assigned_block_loses_its_hash, MANY_PREFIXES, (STREAM,)),
    Rule(wire.a_host_block_loses_its_hash_when_another_is_copied_there, MIXES["swaps, poison raises"], (STREAM,)),
    Rule(wire.a_host_block_is_listed_only_when_its_copy_is_complete, MIXES["swaps, poison raises"], (STREAM,)),
    Rule(wire.a_session_begins_with_everything_that_lives, MIXES["scheduler crashes"], (PROGRESS,)),
    Rule(
        wire.pending_attaches_are_sent_again,
        replace(MIXES["frontends and scheduler crash"], frontend_crashes=8, scheduler_crashes=4),
        (PROGRESS,),
    ),
    Rule(wire.what_a_frontend_does_not_name_is_aborted, replace(MIXES["pauses"], pauses=10, leaving=0.5), (REST,)),
    Rule(
        wire.only_the_owner_ends_a_request,
        replace(MIXES["clients move"], moves=40, scheduler_crashes=0, weather=Weather(delay=(0.02, 0.1))),
        (ENDING, PROGRESS),
    ),
    Rule(wire.a_dead_frontends_requests_run_on, MANY_DEATHS, (ENDING,)),
    Rule(wire.the_grace_ends, replace(MIXES["frontends crash"], frontend_crashes=8, credit=4), (REST,)),
    Rule(wire.a_lost_workers_requests_go_elsewhere, MIXES["workers crash"], (ACCOUNTS, PROGRESS)),
    Rule(steps.a_slots_generation_moves_with_its_owner, MIXES["clients leave"], (LINK, ACCOUNTS, STREAM)),
    Rule(steps.forks_get_their_own_copy_of_the_partial_block, replace(MIXES["calm"], forks=0.8), (STREAM,)),
    Rule(steps.a_copy_under_way_holds_its_host_blocks, MIXES["swaps, scheduler crashes"], (STREAM,)),
    Rule(steps.suspects_run_alone, MIXES["poison raises"], (PROGRESS,)),
    Rule(steps.a_nan_that_came_with_a_shared_block_ends_nobody, ONE_PREFIX, (ENDING,)),
    Rule(steps.a_nan_withdraws_the_hashes_of_its_table, ONE_PREFIX, (ENDING,)),
    Rule(steps.a_leaving_worker_goes_empty, MIXES["drains"], (DRAIN,)),
    Rule(steps.positions_to_be_told_are_not_taken_from_a_cache, MIXES["prompt scores"], (PROGRESS, ENDING)),
)
