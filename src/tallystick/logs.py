"""Logs: one JSON object a line on standard output, with ids and never with payloads, secrets or URLs of portals."""

import json
import logging
import sys
from collections.abc import Callable
from traceback import format_tb
from typing import Any

import msgspec
import structlog

# More causes than this an error has only when they go round in a circle.
MAX_CAUSES = 20


def describe_error(error: BaseException) -> dict[str, str]:
    """What a line says of an error: its class, PostgreSQL's SQLSTATE if there is one, and the lines of code.

    Never its text, nor that of a cause: it may repeat what was sent, as "DETAIL: Key (ref)=(erika)".
    """
    chain = _list_causes(error)
    told = {"error": type(error).__name__}
    if sqlstate := next((state for each in chain if isinstance(state := getattr(each, "sqlstate", None), str)), None):
        told["sqlstate"] = sqlstate
    # The first cause first, as Python shows them.
    told["traceback"] = "\n".join(
        "".join(format_tb(each.__traceback__)) + type(each).__qualname__ for each in reversed(chain)
    )
    return told


def _list_causes(error: BaseException) -> list[BaseException]:
    """The error and what led to it: causes, errors that were being handled, and the members of a group."""
    chain = [error]
    for each in chain:
        cause = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        members = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        chain += [other for other in (cause, *members) if other is not None and other not in chain]
        if len(chain) > MAX_CAUSES:
            break
    return chain


def _replace_exception(_: object, __: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What others log with an exception, as the server and asyncio do, without its text."""
    given = line.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else sys.exception() if given is True else given
    if not isinstance(error, BaseException):
        return line
    # What follows the first line shows the task that failed, and in it the exception.
    return {**line, "event": str(line["event"]).partition("\n")[0], **describe_error(error)}


def _encode(line: structlog.typing.EventDict, default: Callable[[Any], Any]) -> bytes:
    try:
        return msgspec.json.encode(line, enc_hook=default)
    except UnicodeEncodeError:  # half of a character, which has no UTF-8
        return json.dumps(line, default=default).encode()


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's records to standard output as JSON lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, _replace_exception, structlog.processors.JSONRenderer(_encode)],
        logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _replace_exception,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "httpcore", "stripe", "uvicorn.access", "alembic"):
        # They log URLs, parameters or a line per call; what matters of them is in our own lines.
        logging.getLogger(chatty).setLevel(logging.WARNING)
