"""Variables of the environment that look like ours and are not: a misspelt setting must not be ignored in silence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from protocol.flags import FLAGS, TABLES, UP

PREFIX = "PAGEWIRE_"
OTHERS = (  # that are no settings of a service
    *("CONFIG", "URL", "ADMIN_URL", "CACHE"),
    *("PARENT", "CHAOS", "KILL", "ORACLE_STEP_TIME", "ORACLE_MARKS", "SIMULATED_PER_TOKEN", "SIMULATED_PER_KV_TOKEN"),
)


def known_variables() -> set[str]:
    """The names that somebody reads, without PAGEWIRE_. A role's own are all settings: which it has, it alone knows."""
    shared = {name.upper() for name, flag in FLAGS.items() if not flag.own}
    own = {f"{role.upper()}_{name.upper()}" for role in TABLES if role != UP for name in FLAGS}
    return {*shared, *own, *OTHERS}


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A line for each name that begins like ours and is read by nobody, with the nearest that is. Values are not told."""
    known = known_variables()
    lines = []
    for name in sorted({name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)} - known):
        near = get_close_matches(name, known, 1)
        meant = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        lines.append(f"the environment's {PREFIX}{name} is no setting and is ignored{meant}")
    return lines
