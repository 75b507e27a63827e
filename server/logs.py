"""The log: one JSON object a line on stderr, with the request's own line among them.

Knows no text of prompts, no key and no header; what a record says is what its caller put into it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from server.exchange import Exchange

access = logging.getLogger("promptstitch.access")


class JsonFormatter(logging.Formatter):
    """`{"ts", "level", "logger", "message", …fields, "error"?}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, stream: TextIO = sys.stderr) -> None:
    """Send the process's log to `stream` as JSON lines, from `level` on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpcore", "httpx", "asyncio", "sqlalchemy", "multipart", "python_multipart"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def log_exchange(exchange: Exchange, method: str, route: str, seconds: float) -> None:
    """The one line of a request."""
    if not access.isEnabledFor(logging.INFO):
        return
    timings = exchange.timings
    fields = {
        "request_id": exchange.request_id,
        "key_id": exchange.key_id,
        "method": method,
        "route": route,
        "status": exchange.status,
        "code": exchange.code,
        "task": exchange.task,
        "prompt_digest": exchange.prompt_digest,
        "text_tokens": exchange.text_tokens,
        "soft_tokens": exchange.soft_tokens,
        "completion_tokens": exchange.completion_tokens,
        "queued_ms": _ms(timings.queued) if timings else None,
        "prefill_ms": _ms(timings.prefill) if timings else None,
        "decode_ms": _ms(timings.decode) if timings else None,
        "total_ms": _ms(seconds),
        "finish_reason": exchange.finish_reason,
    }
    access.info("request", extra={"fields": {name: value for name, value in fields.items() if value is not None}})


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
