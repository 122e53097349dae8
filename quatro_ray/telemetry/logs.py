"""Python's logging on stderr, with secrets masked: for the driver with --verbose, and for every actor."""

from __future__ import annotations

import logging
import os
import re

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_MIN_SECRET_CHARACTERS = 8
"""Shorter values of such variables are more likely to be flags, and would mask ordinary text."""
_SECRET_TEXT = (
    (re.compile(r"(Bearer\s+)\S+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),  # user and password of a URL
)


def log_to_stderr() -> None:
    """Print messages of this package from INFO on to stderr. Calling it again changes nothing.

    Ray writes an actor's stderr into the logs folder of its session on the actor's machine, and shows it on the driver
    too if the driver runs with --verbose.
    """
    logger = logging.getLogger("quatro_ray")
    if any(isinstance(handler.formatter, _Masking) for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking(_FORMAT))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def without_secrets(text: str) -> str:
    """Replace bearer tokens, the user and password of URLs, and values of variables named *TOKEN, *KEY, … by `***`."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= _MIN_SECRET_CHARACTERS:
            text = text.replace(value, "***")
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


class _Masking(logging.Formatter):
    """A formatter that masks secrets, those in tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))
