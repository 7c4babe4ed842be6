"""The log line of a request that is over."""

from __future__ import annotations

import logging

from frontend.entries import Entry

log = logging.getLogger("frontend")


def log_end(entry: Entry, now: float) -> None:
    """One line for each request: what failed for a reason of ours is a warning, anything else is for debugging."""
    error = entry.error
    level = logging.WARNING if error is not None and error.status >= 500 else logging.DEBUG
    if log.isEnabledFor(level):
        extra = {
            "request": entry.request.hex(),
            "model": entry.new.model,
            "tenant": entry.new.tenant,
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": sum(len(choice.tokens) for choice in entry.choices),
            "finish": ",".join(entry.endings),
            "seconds": round(now - entry.arrived, 6),
        }
        if error is not None:
            extra |= {"status": error.status, "code": error.code, "reason": error.reason}
        log.log(level, "request failed" if error is not None else "request ended", extra=extra)
