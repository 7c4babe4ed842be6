"""What a worker's steps cost, measured from its results: what it takes to copy a block, and what to compute its tokens again."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.1  # of a new measurement in a mean
ENOUGH = 32  # tokens or blocks from which a step says something about the cost of one


@dataclass(slots=True)
class Costs:
    """Means in seconds; 0 where nothing has been measured. A copy is thought free until one has been measured.

    `prefer`: "swap" copies whatever can be copied, "recompute" nothing, "auto" what is predicted to be cheaper.
    """

    prefer: str = "auto"
    decode: float = 0.0  # a step of decodes alone
    token: float = 0.0  # a token of a prefill, beyond that
    block: float = 0.0  # a block copied from or to the host

    def took(self, seconds: float, tokens: int, copied: int) -> None:
        """A step with `tokens` of prefills and `copied` blocks has taken so long."""
        if not tokens and not copied:
            self.decode = _mean(self.decode, seconds)
            return
        beyond = max(seconds - self.decode, 0.0)
        if copied and not (self.decode and (self.token or not tokens)):
            return  # what of it the copies took cannot be told yet
        if copied >= ENOUGH or (copied and not tokens):
            self.block = _mean(self.block, max(beyond - tokens * self.token, 0.0) / copied)
        elif tokens >= ENOUGH and not copied:
            self.token = _mean(self.token, beyond / tokens)

    def prefers_copies(self, copies: int, tokens: int) -> bool:
        """Whether to copy a block so many times rather than compute so many tokens again."""
        if self.prefer != "auto":
            return self.prefer == "swap"
        return copies * self.block < tokens * self.token if self.token else bool(tokens)


def _mean(old: float, new: float) -> float:
    return (1 - SHARE) * old + SHARE * new if old else new
