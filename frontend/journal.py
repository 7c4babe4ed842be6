"""The journal: the truth about each request (DESIGN §1), free of I/O, clocks and randomness.

Tokens become *committed* here. A scheduler that was lost is replaced by telling the next one everything that lives,
from here; so nothing in it depends on which scheduler or worker produced a token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from frontend.deadlines import Deadlines
from frontend.entries import Choice, Entry, NewRequest
from frontend.fetch import Fetch, Fetches
from frontend.measures import Measures
from frontend.rows import prompt_logprobs, rows
from protocol.codec import MAX_SUBMIT, encode
from protocol.columns import pack, unpack, unpack_floats
from protocol.counters import Counters
from protocol.messages import (
    PROTOCOL,
    SCORES_SINCE,
    Abort,
    Attach,
    Credit,
    Done,
    Failed,
    FileChunk,
    Gone,
    Message,
    ModelInfo,
    Models,
    Moved,
    PromptScores,
    Resumed,
    SamplingParams,
    Submit,
    Tokens,
    Welcome,
)
from protocol.messages import Journal as JournalMessage
from protocol.times import Times


class NotYet(Exception):
    """A request of another frontend cannot be gone on with here now, but may soon."""


class Journal:
    """All requests of one frontend incarnation.

    `out` holds messages for the open session, in order; it is empty while there is none, since a new session begins
    with everything that lives. `touched` holds, by handle, the entries with news for their listeners; the shell
    empties it. `fault` says why the session must be ended, None if it need not.
    `revive` turns the SUBMIT of another frontend's request into a NewRequest of ours (with a detokenizer); it raises
    LookupError if it cannot, NotYet if that may change: then `attach_again` is to be called.
    """

    def __init__(self, incarnation: int, times: Times, counters: Counters, revive: Callable[[Submit], NewRequest] | None = None) -> None:
        self.incarnation = incarnation
        self.counters = counters
        self.out: deque[Message] = deque()
        self.touched: dict[int, Entry] = {}
        self.fault: str | None = None
        self.models: dict[str, ModelInfo] = {}
        self.models_changed = False  # set at each MODELS; the shell clears it
        self.credit = 0
        self.measures: dict[str, Measures] = {}  # by model
        self.fetches = Fetches()
        self.is_open = False
        self._deadlines = Deadlines(times)
        self._revive = revive
        self._protocol = PROTOCOL  # of the open session
        self._next_handle = 0
        self._by_handle: dict[int, Entry] = {}
        self._by_id: dict[bytes, Entry] = {}

    # ---------------------------------------------------------------- what the API asks for

    def submit(self, new: NewRequest, now: float) -> Entry:
        """Take a request. Without a session it waits for the next one. Raises ValueError if its id is known."""
        entry = self._add(new, now, self._measures(new.model))
        if (submit := self._submit(entry, now)) is not None:
            self._send(submit)
        if entry.ended:  # nothing was asked for but what is known already
            self.touched[entry.handle] = entry
        self._refuse_scores(entry)
        return entry

    def attach(self, request: bytes, now: float, told: Sequence[int] = (), tenant: str = "") -> Entry:
        """Ask for a request of another frontend; the entry ends with status 404 if nobody has it.

        `told`: tokens of each choice that the client has. Raises ValueError if the request is in this journal.
        """
        entry = self._add(NewRequest(request, "", b"", SamplingParams(0), ()), now, Measures())
        entry.attaching = Attach(request, entry.handle, pack(list(told)), tenant)
        self._send(entry.attaching)
        return entry

    def attach_again(self) -> None:
        """Ask once more for what came and could not be revived yet; what a scheduler has told of it meanwhile, it tells again."""
        for entry in self._by_handle.values():
            if entry.put_off and entry.attaching and not entry.ended:
                entry.put_off = False
                self._send(entry.attaching)

    def abort(self, entry: Entry, choices: Sequence[int] | None = None, now: float = 0.0) -> None:
        """End choices (all by default) with finish reason "abort"; those that have ended stay as they are."""
        going = [c for c in entry.choices if not c.finish_reason and (choices is None or c.index in choices)]
        for choice in going:
            choice.end("abort")
        entry.unfinished -= len(going)
        if going or (entry.unscored and choices is None):
            self._send(Abort(entry.request, b"" if choices is None else pack([c.index for c in going])))
            self.touched[entry.handle] = entry
        if choices is None:
            entry.finish("abort")

    def done(self, entry: Entry, now: float = 0.0) -> None:
        """Forget a request: its last byte has gone to the client, or the client has gone. Aborts what still runs."""
        if self._by_handle.pop(entry.handle, None) is None:
            return
        if not entry.ended:
            self.abort(entry)
        del self._by_id[entry.request]
        self.touched.pop(entry.handle, None)
        if not entry.moved:
            self._send(Done(entry.request))

    def fetch(self, tokenizer: bytes) -> Fetch:
        """Ask for tokenizer files by their hash; the answer is in the returned object's `bundle` or `failed`."""
        idle = self.fetches.request() is None
        fetch = self.fetches.ask(tokenizer)
        if idle:
            self._send(fetch.request())
        return fetch

    # ---------------------------------------------------------------- what the link reports

    def opened(self, welcome: Welcome, now: float) -> None:
        """A session is open: name everything that lives, then close the list with RESUMED."""
        self.is_open = True
        self._protocol = welcome.protocol
        self.fault = None
        self.credit = welcome.credit
        self.out.clear()
        living = [entry for entry in self._by_handle.values() if entry.error is None and not entry.moved]
        said = [(entry, entry.attaching or self._submit(entry, now)) for entry in living]
        named = [entry for entry, message in said if message is not None]
        self.out.extend(message for _, message in said if message is not None)
        self.out.append(Resumed(len(named)))
        for entry in named:
            self._refuse_scores(entry)
        if (request := self.fetches.request()) is not None:
            self.out.append(request)

    def closed(self, now: float) -> None:
        """The session is over; what was not yet sent is said again in the next one."""
        if self.is_open:
            self._deadlines.closed_at = now
        self.is_open = False
        self.out.clear()

    def message(self, message: Message, now: float) -> None:
        """Take a message of the open session. After a fault the rest of the session is ignored."""
        if self.fault is not None:
            self.counters.add("journal_after_fault")
            return
        match message:
            case Tokens():
                self._tokens(message, now)
            case Models():
                # A scheduler that has just begun knows none until its workers have come: what was served will be again.
                gone = [replace(info, workers_ready=0, workers_loading=0) for info in self.models.values()]
                self.models = {info.name: info for info in message.models or gone}
                self.models_changed = True
            case PromptScores():
                self._scores(message)
            case Failed():
                self._failed(message)
            case Moved():
                self._moved(message)
            case JournalMessage():
                self._adopt(message.submit, now)
            case Gone():
                reason = "the stream is gone: no service knows this request"
                self._failed(Failed(message.request, 404, "stream_gone", reason, "Last-Event-ID"))
            case Credit():
                self.credit = message.limit
            case FileChunk():
                self._chunk(message)
            case _:
                self.counters.add("journal_unexpected")

    def tick(self, now: float) -> None:
        """End what has waited too long for a scheduler. While a session is open the scheduler keeps the deadlines."""
        if self.is_open:
            return
        for entry in [e for e in self._by_handle.values() if not e.ended]:
            if (failed := self._deadlines.overdue(entry, now)) is not None:
                self._failed(failed)

    def next_time(self) -> float:
        """When `tick` has something to do next; infinity if never."""
        if self.is_open:
            return math.inf
        return min((self._deadlines.due(entry) for entry in self._by_handle.values() if not entry.ended), default=math.inf)

    def entries(self) -> list[Entry]:
        """Every request not yet done, by age."""
        return list(self._by_handle.values())

    # ---------------------------------------------------------------- inside

    def _measures(self, model: str) -> Measures:
        measures = self.measures.get(model)
        if measures is None:
            measures = self.measures[model] = Measures()
        return measures

    def _add(self, new: NewRequest, now: float, measures: Measures) -> Entry:
        if new.request in self._by_id:
            raise ValueError("a request with this id is in the journal already")
        entry = Entry(new, self._next_handle, now, measures)
        self._next_handle += 1
        self._by_handle[entry.handle] = self._by_id[entry.request] = entry
        return entry

    def _submit(self, entry: Entry, now: float) -> Submit | None:
        """What tells a scheduler of a request; None if it takes more than a frame may have: then the request fails, alone.

        Sent, it would cost the session, and would be sent again in the next one.
        """
        submit = entry.submit(now)
        size = len(encode(submit))
        if size <= MAX_SUBMIT:
            return submit
        self.counters.add("journal_too_large")
        reason = f"prompt, output and parameters take {size} bytes, and a scheduler takes {MAX_SUBMIT}"
        self._failed(Failed(entry.request, 413, "request_too_large", reason))
        return None

    def _send(self, message: Message) -> None:
        if self.is_open:
            self.out.append(message)

    def _tokens(self, message: Tokens, now: float) -> None:
        self._admissions(message)
        for handle, index, first, ids, logprobs in rows(message):
            entry = self._by_handle.get(handle)
            if entry is not None and entry.put_off:
                continue
            if entry is None or not 0 <= index < len(entry.choices):
                self.counters.add("journal_unknown")
                continue
            choice = entry.choices[index]
            if choice.finish_reason:
                continue
            length = len(choice.tokens)
            if first > length:
                self.counters.add("journal_gap")
                self.fault = f"tokens from index {first} on for a choice of {length} tokens"
                break
            if first + len(ids) <= length:
                self.counters.add("journal_duplicate")
                continue
            entry.admitted = True
            try:
                choice.extend(ids[length - first :], logprobs[length - first :])
            except Exception as error:  # a fault in one request's text must not reach its neighbours
                self.counters.add("journal_exception")
                choice.text = None
                self._send(Abort(entry.request))
                self._failed(Failed(entry.request, 500, "internal_error", f"the text could not be made: {error!r}"))
                continue
            if choice.finish_reason:
                self._choice_ended(entry, choice)
            entry.came(choice, length, now)
            if entry.new.every_step or not entry.unfinished:
                self.touched[handle] = entry
        for measures in self.measures.values():
            measures.step(now)

    def _admissions(self, message: Tokens) -> None:
        queued = unpack_floats(message.queued).tolist()
        for at, (handle, cached) in enumerate(zip(unpack(message.admitted).tolist(), unpack(message.cached).tolist(), strict=True)):
            entry = self._by_handle.get(handle)
            if entry is not None:
                entry.admitted = True
                if entry.cached < 0:
                    entry.cached = cached
                    entry.queued = queued[at] if queued else -1.0

    def _scores(self, message: PromptScores) -> None:
        entry, scores = self._by_handle.get(message.handle), message.scores
        if entry is not None and entry.put_off:
            return
        if entry is None or not entry.unscored:
            self.counters.add("journal_unknown")
            return
        told = entry.scored - scores.first
        if told < 0:
            self.counters.add("journal_gap")
            self.fault = f"log probabilities from position {scores.first} on for a prompt that has them before {entry.scored}"
            return
        if told >= scores.count:
            self.counters.add("journal_duplicate")
            return
        entry.admitted = True
        entry.scores += prompt_logprobs(scores)[told:]
        entry.scored = scores.first + scores.count
        if not entry.unscored:
            self.touched[entry.handle] = entry

    def _refuse_scores(self, entry: Entry) -> None:
        """A scheduler of an older version would never send them."""
        if self.is_open and entry.unscored and self._protocol < SCORES_SINCE:
            self._send(Abort(entry.request))
            reason = "prompt_logprobs: the scheduler is of an older version, which has none"
            self._failed(Failed(entry.request, 501, "unsupported", reason, "prompt_logprobs"))

    def _choice_ended(self, entry: Entry, choice: Choice) -> None:
        entry.unfinished -= 1
        if isinstance(choice.stop_reason, str):  # nobody else sees stop strings
            self._send(Abort(entry.request, pack([choice.index])))

    def _failed(self, message: Failed) -> None:
        entry = self._by_id.get(message.request)
        if entry is None or entry.ended:
            self.counters.add("journal_unknown")
            return
        entry.error = message
        entry.finish("error")
        self.touched[entry.handle] = entry

    def _moved(self, message: Moved) -> None:
        entry = self._by_id.get(message.request)
        if entry is None:
            self.counters.add("journal_unknown")
            return
        entry.moved = True
        entry.finish("abort")
        self.touched[entry.handle] = entry

    def _adopt(self, submit: Submit, now: float) -> None:
        entry = self._by_id.get(submit.request)
        if entry is None or not entry.attaching or self._revive is None:
            self.counters.add("journal_unknown")
            return
        try:
            new = self._revive(submit)
        except NotYet:
            entry.put_off = True
            return
        except LookupError as error:
            self._failed(Failed(submit.request, 404, "stream_gone", f"the stream cannot be resumed: {error}", "Last-Event-ID"))
            return
        for choice in entry.adopt(new, submit, self._measures(new.model), now):
            self._choice_ended(entry, choice)
        self.touched[entry.handle] = entry

    def _chunk(self, message: FileChunk) -> None:
        if not self.fetches.take(message):
            self.counters.add("journal_unknown")
        elif (request := self.fetches.request()) is not None:
            self._send(request)
