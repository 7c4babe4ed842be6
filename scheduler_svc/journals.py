"""A request and its journal: as this scheduler would tell it, and how far that of a frontend agrees."""

from __future__ import annotations

from msgspec.structs import replace

from protocol.columns import pack, unpack
from protocol.messages import Choice as TheirChoice
from protocol.messages import Submit
from scheduler_svc.requests import Choice, Request


def journal_of(request: Request, now: float) -> Submit:
    """The request as another frontend, or another scheduler, would submit it."""
    told = request.submit
    choices = [TheirChoice(choice.index, choice.seed, pack(choice.known), choice.dismissed) for choice in request.choices]
    return Submit(
        request=request.id,
        handle=request.handle,
        model=told.model,
        prompt=told.prompt,
        params=told.params,
        choices=choices,
        owner=request.owner,
        admitted=request.admitted,
        age=max(now - request.arrival, 0.0),
        deadline=max(request.deadline - now, 0.001) if request.deadline else 0.0,
        priority=told.priority,
        tenant=told.tenant,
        cache_salt=told.cache_salt,
        cached=request.cached,
        header=told.header,
        scored=request.scored,
        trace=told.trace,
    )


def cut(journal: Submit, told: list[int]) -> Submit:
    """The journal without the tokens whose log probabilities the client has not seen: they are sampled again.

    The prompt's are told before anything else of a choice.
    """
    counts = [*told, *[0] * len(journal.choices)][: len(journal.choices)]
    if journal.params.prompt_logprobs >= 0:
        journal = replace(journal, scored=max(len(journal.prompt) // 4, 1) if all(counts) else 1)
    if journal.params.logprobs < 0:
        return journal
    choices = [
        TheirChoice(choice.index, choice.seed, choice.known[: 4 * count]) if len(choice.known) > 4 * count else choice
        for choice, count in zip(journal.choices, counts, strict=True)
    ]
    return replace(journal, choices=choices)


def must_restart(choice: Choice, told: TheirChoice) -> bool:
    """Whether the journal knows more than we do, or lacks logprobs, which are told once only."""
    committed, known = len(told.known) // 4, len(choice.known)
    return not told.ended and (committed > known or (committed < known and choice.request.params.logprobs >= 0))


def ends(choice: Choice) -> bool:
    """Whether a choice's known tokens end it: by their number, or by a stop id."""
    params, tokens = choice.request.params, choice.tokens
    if len(tokens) >= params.max_tokens:
        return True
    return len(tokens) > params.min_tokens and tokens[-1].item() in unpack(params.stop_ids)
