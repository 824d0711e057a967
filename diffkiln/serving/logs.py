"""Log lines of a server: text, or JSON with one object a line. Neither holds a head, a body or a query."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from diffkiln.guards.printable import MAX_MESSAGE, printable


def set_up(as_json: bool, level: str) -> None:
    """Sends the log of diffkiln and uvicorn to the standard error.

    Args:
        as_json: Whether lines are JSON.
        level: Of diffkiln's own lines: "debug", "info", "warning" or "error".
    """
    handler = StandardError()
    handler.setFormatter(JsonLines() if as_json else TextLines())
    for name, lowest in (("diffkiln", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(lowest)


class StandardError(logging.Handler):
    """Writes to what is the standard error when a line comes, which may not be what it was before."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields that come with it."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[-MAX_MESSAGE:]
        return json.dumps(entry)


class TextLines(logging.Formatter):
    """One line for people: time, level, message, and the fields as words."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = f"{_utc(record)} {record.levelname.lower()} {_message(record)}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _message(record: logging.LogRecord) -> str:
    return printable(record.getMessage(), MAX_MESSAGE)


def _utc(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
