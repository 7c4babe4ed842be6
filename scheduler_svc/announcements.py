"""What frontends are told of all workers together: which models there are, and how much credit that gives."""

from __future__ import annotations

from protocol.messages import Credit, ModelInfo, Models
from scheduler_svc.depth import LEAST
from scheduler_svc.frontends import Frontends
from scheduler_svc.ledger import Ledger
from scheduler_svc.models import Model
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.worker import Worker

CREDIT_STEPS = 8  # a frontend's credit, in steps of all slots and plans in flight


class Announcements:
    """Tells every frontend what has changed, and a new one how things stand."""

    def __init__(
        self, settings: SchedulerSettings, ledger: Ledger, frontends: Frontends, models: dict[str, Model], workers: dict[int, Worker]
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._frontends = frontends
        self._models = models
        self._workers = workers
        self._told: list[ModelInfo] = []
        frontends.limit = self._credit()

    def greet(self, session: int) -> None:
        """A frontend's session is open; its credit stands in the WELCOME."""
        self._ledger.out.append((session, Models(self._infos()), 0))

    def changed(self) -> None:
        """Something has changed about a worker: tell of it if that matters to frontends."""
        infos = self._infos()
        if infos != self._told:
            self._told = infos
            for session in self._frontends.by_session:
                self._ledger.out.append((session, Models(infos), 0))
        limit = self._credit()
        if limit != self._frontends.limit:
            self._frontends.limit = limit
            for session in self._frontends.by_session:
                self._ledger.out.append((session, Credit(limit), 0))

    def loading(self) -> int:
        """Workers that have not said READY yet."""
        return sum(not worker.ready for worker in self._workers.values())

    def _infos(self) -> list[ModelInfo]:
        loading = self.loading()
        return [info for info in (model.info(loading) for model in self._models.values()) if info is not None]

    def _credit(self) -> int:
        """Tokens that each frontend may have outstanding."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        depth = max((worker.depth.wanted for worker in ready), default=self._settings.depth or LEAST)
        return CREDIT_STEPS * depth * max(sum(worker.slots.count for worker in ready), self._settings.max_num_seqs)
