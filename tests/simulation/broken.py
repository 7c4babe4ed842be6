"""What is raised when a run breaks a rule, and the kinds of rules that there are."""

from __future__ import annotations

STREAM = "stream"  # a choice's tokens or text are not the oracle's
ENDING = "ending"  # a request ended twice, in the wrong way, or with an error that nothing excuses
PROGRESS = "progress"  # something has no end, or asks to be woken for ever
ACCOUNTS = "accounts"  # a scheduler's tables, references and credit do not agree
CREDIT = "credit"  # more was sampled for a frontend than it may have outstanding
PLAN = "plan"  # a worker was sent a plan that contradicts what it holds
MESSAGE = "message"  # somebody was sent what cannot be used
CHARGE = "charge"  # not one scheduler is in charge, or one that is not has requests
REST = "rest"  # something is kept though nobody asks for anything any more
LINK = "link"  # a session ended without a fault
DRAIN = "drain"  # a worker was let go with work of its own
CRASH = "crash"  # a service would have died of an exception


class Broken(AssertionError):
    """A rule was broken; the text tells the story."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text
