"""What frontends ask: SUBMIT, ABORT, DONE, ATTACH, RESUMED. Every one of them may come twice, late, or from the wrong one."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from protocol.codec import MAX_SUBMIT, encode
from protocol.columns import EMPTY, Int32, pack, unpack
from protocol.counters import Counters
from protocol.messages import Abort, Attach, Done, Failed, Gone, Journal, Moved, Resumed, Submit
from scheduler_svc.arrivals import Arrivals
from scheduler_svc.frontends import Frontend, Frontends
from scheduler_svc.journals import cut, ends, journal_of, must_restart
from scheduler_svc.ledger import Ledger
from scheduler_svc.models import Model
from scheduler_svc.prefix import Hasher
from scheduler_svc.requests import SCORER, Choice, Request, State
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.waiting import Shares

RETRY_AFTER = 1.0, 60.0  # seconds: bounds of what is told with a refusal for a full queue


class Intake:
    """Keeps the ledger as the frontends say. New choices wait for a slot by way of the arrivals."""

    def __init__(
        self,
        settings: SchedulerSettings,
        ledger: Ledger,
        frontends: Frontends,
        models: dict[str, Model],
        shares: Shares,
        counters: Counters,
        arrivals: Arrivals,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._frontends = frontends
        self._models = models
        self._shares = shares
        self._counters = counters
        self._arrivals = arrivals
        self._numbers = 0
        self._attaches: dict[bytes, tuple[int, Attach]] = {}  # unknown ones, held while resubmissions may still come
        self.hasher: Hasher
        self.attach_hold_until = 0.0

    # ------------------------------------------------------------ SUBMIT

    def submit(self, frontend: Frontend, message: Submit, now: float) -> None:
        """Take a new request, or go on with one that lives."""
        if not frontend.resumed:
            frontend.named += 1
        request = self._ledger.requests.get(message.request)
        if request is None:
            self._new(frontend, message, now)
        elif message.owner < request.owner or (message.owner == request.owner and request.frontend.incarnation != frontend.incarnation):
            self._counters.add("scheduler_not_owner")
            self._ledger.send(frontend, Moved(message.request))
        else:
            self._resume(frontend, request, message, now)
        held = self._attaches.pop(message.request, None)
        if held is not None and held[0] in self._frontends.by_session:
            self.attach(self._frontends.by_session[held[0]], held[1], now)

    def _new(self, frontend: Frontend, message: Submit, now: float) -> None:
        refusal = self._refusal(message)
        if refusal is not None:
            self._ledger.totals.failed += 1
            self._ledger.send(frontend, refusal)
            return
        model = self._models.get(message.model)
        if model is None:
            model = self._models[message.model] = Model(message.model, self._shares, self._ledger.totals.tally(message.model))
        self._numbers += 1
        priority = message.priority if self._settings.policy == "priority" else 0
        request = Request(message, self._numbers, priority, model, frontend, self.hasher.root(message.cache_salt), now)
        self._ledger.add(request)
        self._score(request, now)
        for choice, told in zip(request.choices, message.choices, strict=True):
            choice.dismissed = told.ended
            if told.ended or ends(choice):
                self._ledger.stop(choice)
            else:
                self._arrivals.enqueue(choice, now)
        self._ledger.settle(request, now)

    def _score(self, request: Request, now: float) -> None:
        """Let the log probabilities of the prompt be computed from `request.scored` on, if any are still to be told."""
        if request.scorer is not None:
            self._ledger.stop(request.scorer)
            request.scorer = None
        if request.unscored:
            request.scorer = Choice(request, SCORER, 0, EMPTY)
            self._arrivals.enqueue(request.scorer, now)

    def _refusal(self, message: Submit) -> Failed | None:
        """Why a new request cannot be taken."""
        model = self._models.get(message.model)
        if model is None or model.ready is None:
            if not self._arrivals.loading() and any(other.ready is not None for other in self._models.values()) and not message.admitted:
                return Failed(message.request, 404, "model_not_found", f"The model {message.model!r} does not exist.", "model")
        elif reason := model.objection(message):
            return Failed(message.request, 400, "invalid_token", reason, "prompt")
        if not message.admitted:
            requests, tokens_waiting = self._arrivals.waiting()
            settings = self._settings
            if requests >= settings.max_waiting_requests or tokens_waiting + len(message.prompt) // 4 > settings.max_waiting_tokens:
                self._counters.add("scheduler_refused_full")
                wait = model.wait(requests) if model is not None else 0.0
                retry_after = min(max(wait, RETRY_AFTER[0]), RETRY_AFTER[1])
                return Failed(message.request, 429, "queue_full", "Too many requests are waiting.", retry_after=retry_after)
        return None

    def _resume(self, frontend: Frontend, request: Request, message: Submit, now: float) -> None:
        """Go on from what the frontend's journal has."""
        if request.frontend.incarnation != frontend.incarnation:
            self._ledger.send(request.frontend, Moved(request.id))
        request.owner = message.owner
        lacks = message.scored < request.scored or any(map(must_restart, request.choices, message.choices))
        if request.ended and request.failure is None and lacks:
            self._ledger.forget(request)
            self._new(frontend, replace(message, admitted=message.admitted or request.admitted), now)
            return
        self.adopt(frontend, request, message.handle)
        if request.failure is not None:
            self._ledger.send(frontend, request.failure)
            return
        if message.scored != request.scored and not request.ended:
            request.scored = message.scored
            self._score(request, now)
        if message.cached < 0 <= request.cached:
            frontend.admitted.append((request.handle, request.cached, request.queued))
        handles, choices, firsts, counts, ids = [], [], [], [], []
        for choice, told in zip(request.choices, message.choices, strict=False):
            committed, known = len(told.known) // 4, choice.known
            if told.ended:
                choice.dismissed = True
                self._ledger.stop(choice)
            elif must_restart(choice, told):
                self._restart(choice, unpack(told.known), now)
            elif committed < len(known):
                handles.append(request.handle)
                choices.append(choice.index)
                firsts.append(committed)
                counts.append(len(known) - committed)
                ids.append(known[committed:])
        if ids or frontend.admitted:
            flat = np.concatenate(ids) if ids else EMPTY
            tokens = frontend.tokens(pack(handles), pack(choices), pack(firsts), pack(counts), pack(flat))
            self._ledger.send(frontend, tokens, len(flat))
        self._ledger.settle(request, now)

    def _restart(self, choice: Choice, known: Int32, now: float) -> None:
        """Forget what was sampled beyond the journal; the same seed samples it again."""
        self._ledger.stop(choice)
        choice.worker = None
        choice.tokens = known
        if not ends(choice):
            choice.state = State.WAITING
            self._arrivals.enqueue(choice, now)

    def adopt(self, frontend: Frontend, request: Request, handle: int) -> None:
        """The request belongs to this frontend session from here on; rows in flight count against its credit."""
        old = request.frontend
        waiting = [(choice, choice.queue) for choice in request.work if choice.queue is not None]
        for choice, queue in waiting:
            queue.remove(choice)
        old.requests.pop(request.id, None)
        old.unsent -= request.unsent
        request.unsent = 0
        request.frontend = frontend
        request.handle = handle
        frontend.requests[request.id] = request
        for choice in request.work:
            if choice.slot >= 0 and choice.worker is not None:
                s = choice.worker.slots
                s.handle[choice.slot] = handle
                s.frontend[choice.slot] = frontend.index
                choice.worker.reassign(choice.slot, old, frontend)
        for choice, queue in waiting:
            queue.add(choice)
        self._frontends.sweep()

    # ------------------------------------------------------------ the others

    def abort(self, frontend: Frontend, message: Abort, now: float) -> None:
        """Stop some choices, or all."""
        request = self._owned(frontend, message.request)
        if request is None:
            return
        wanted = set(unpack(message.choices).tolist())
        for choice in request.choices if wanted else request.work:
            if not wanted or choice.index in wanted:
                choice.dismissed |= choice.state is not State.ENDED
                self._ledger.stop(choice)
        self._ledger.settle(request, now, aborted=not wanted)

    def done(self, frontend: Frontend, message: Done, now: float) -> None:
        """The client has everything, or has left while its ATTACH was held: forget the request."""
        if message.request in self._attaches and self._attaches[message.request][0] == frontend.session:
            del self._attaches[message.request]
            return
        request = self._owned(frontend, message.request)
        if request is not None:
            self._ledger.abort(request, now)
            self._ledger.forget(request)

    def _owned(self, frontend: Frontend, id: bytes) -> Request | None:
        request = self._ledger.requests.get(id)
        if request is None:
            self._counters.add("scheduler_unknown_request")
            return None
        if request.frontend is not frontend:
            self._counters.add("scheduler_not_owner")
            return None
        return request

    def attach(self, frontend: Frontend, message: Attach, now: float) -> None:
        """Hand the request over, with all that is known of it."""
        if not frontend.resumed:
            frontend.named += 1
        request = self._ledger.requests.get(message.request)
        if request is not None and request.tenant != message.tenant:
            self._counters.add("scheduler_attach_of_another_tenant")
            self._ledger.send(frontend, Gone(message.request))
            return
        if request is None:
            if now < self.attach_hold_until:
                self._give_up(message.request, but=frontend.session)
                self._attaches[message.request] = (frontend.session, message)
            else:
                self._ledger.send(frontend, Gone(message.request))
            return
        if request.frontend.incarnation != frontend.incarnation:
            self._ledger.send(request.frontend, Moved(request.id))
            request.owner += 1
        self.adopt(frontend, request, message.handle)
        journal = journal_of(request, now)
        if request.failure is None:
            journal = cut(journal, unpack(message.told).tolist())
        size = len(encode(journal))
        if size > MAX_SUBMIT:  # the journal could not tell it to another scheduler, nor this one to the journal
            reason = f"the stream cannot be resumed: prompt, output and parameters take {size} bytes of at most {MAX_SUBMIT}"
            self._ledger.send(frontend, Failed(request.id, 413, "request_too_large", reason))
            return
        self._ledger.send(frontend, Journal(journal))
        if request.failure is not None:
            self._ledger.send(frontend, request.failure)
        elif journal.scored != request.scored or any(map(must_restart, request.choices, journal.choices)):
            self._resume(frontend, request, journal, now)

    def release_attaches(self, _now: float) -> None:
        """The time for resubmissions is over: what is still unknown is gone."""
        for request in list(self._attaches):
            self._give_up(request)

    def _give_up(self, request: bytes, but: int = 0) -> None:
        """Hold the ATTACH for a request no longer, if there is one; its frontend is told so, save in session `but`."""
        session, _ = self._attaches.pop(request, (but, None))
        if session != but and session in self._frontends.by_session:
            self._ledger.send(self._frontends.by_session[session], Gone(request))

    def resumed(self, frontend: Frontend, message: Resumed, now: float) -> None:
        """The frontend has named everything that lives: what its earlier sessions left unnamed is aborted."""
        if message.count != frontend.named:
            self._counters.add("scheduler_resumed_miscounted")
        frontend.resumed = True
        for old in self._frontends.mute(frontend.incarnation):
            for request in list(old.requests.values()):
                self._counters.add("scheduler_unnamed_aborted")
                self._ledger.abort(request, now)
                self._ledger.forget(request)
        self._frontends.sweep()
