"""How a line of a service's log looks: text for people, JSON for collectors; both with the fields that a call adds."""

from __future__ import annotations

import json
import logging
import time

FORMATS = ("text", "json")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What the call gave as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class Text(logging.Formatter):
    """`time LEVEL service logger: message key=value …`; times are local."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {service} %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + "".join(f" {key}={value}" for key, value in fields(record).items())


class Json(logging.Formatter):
    """One object a line: time (UTC), level, service, logger, message, the call's fields, and `exception` with its stack."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
