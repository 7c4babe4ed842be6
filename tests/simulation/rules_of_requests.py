"""Rules of who owns what (DESIGN §1), each as a patch that switches it off."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from frontend.entries import Choice as JournalChoice
from frontend.entries import Entry
from protocol.messages import Submit
from scheduler_svc.ledger import Ledger

Patch = pytest.MonkeyPatch


def same_again(message: Any, **changes: object) -> Any:
    return msgspec.structs.replace(message, **changes)


def a_choice_keeps_its_seed(patch: Patch) -> None:
    submit, rng = Entry.submit, random.Random(1)

    def drawn(self: Entry, now: float) -> Submit:
        told = submit(self, now)
        return same_again(told, choices=[same_again(choice, seed=rng.getrandbits(64)) for choice in told.choices])

    patch.setattr(Entry, "submit", drawn)


def the_prompt_is_told_apart_from_known_tokens(patch: Patch) -> None:
    submit = Entry.submit

    def joined(self: Entry, now: float) -> Submit:
        told = submit(self, now)
        if len(told.choices) != 1:
            return told
        (choice,) = told.choices
        return same_again(told, prompt=told.prompt + choice.known, choices=[same_again(choice, known=b"")])

    patch.setattr(Entry, "submit", joined)


def a_stop_string_beats_a_length(patch: Patch) -> None:
    commit = JournalChoice.commit

    def without_text(self: JournalChoice, token: int) -> None:
        text, self.text = self.text, None
        try:
            commit(self, token)
        finally:
            self.text = text

    patch.setattr(JournalChoice, "commit", without_text)


def a_request_is_kept_until_its_frontend_is_done(patch: Patch) -> None:
    settle = Ledger.settle

    def forgetful(self: Ledger, request: Any, now: float, aborted: bool = False) -> None:
        settle(self, request, now, aborted)
        if request.ended and request.failure is None and self.requests.get(request.id) is request:
            self.forget(request)

    patch.setattr(Ledger, "settle", forgetful)
