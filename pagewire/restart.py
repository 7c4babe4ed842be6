"""When a service that died is started again, and when that is given up. No I/O and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.service import EXIT_REFUSED

FIRST_DELAY = 0.1  # seconds; doubles with each death in a row
LONGEST_DELAY = 5.0
LONG_LIFE = 10.0  # seconds after which an earlier death no longer counts
ATTEMPTS = 4  # starts in a row that never got ready
EXIT_USAGE = 2  # click's code for a mistake on the command line


@dataclass
class Restarts:
    """The history of one service: deaths in a row, of these the ones before it was ready, and whether it ever was."""

    deaths: int = 0
    stillborn: int = 0
    proven: bool = False

    def died(self, code: int, lived: float, was_ready: bool) -> float | None:
        """Take a death; returns the seconds to wait before the next start, or None to give up.

        A service that got ready may die as often as it likes, ever later restarted: a request that kills its worker
        must not take the others along, nor a disk that is full for a while. One that never gets ready will not by being
        started for ever.
        """
        if lived >= LONG_LIFE:
            self.deaths = 0
        self.deaths += 1
        self.proven = self.proven or was_ready
        self.stillborn = 0 if self.proven else self.stillborn + 1
        if code in (EXIT_REFUSED, EXIT_USAGE) or self.stillborn >= ATTEMPTS:
            return None
        return min(FIRST_DELAY * 2.0 ** (self.deaths - 1), LONGEST_DELAY)
