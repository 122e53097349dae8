"""A reward that misbehaves once whenever the file of QUATRO_CHAOS_TRIGGER appears; its content says how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TRIGGER = "QUATRO_CHAOS_TRIGGER"
"""Name of the environment variable."""
FORKS, FORGES = "forks", "forges a reply"
_FORGED = {"values": {"answer": 1.0, "hostile": 0.0}, "unreadable": "", "no_verdict": [], "printed": "", "nonce": 1}


def score(query: Any, response: Any) -> float:
    """Return 0; see above for what happens besides."""
    trigger = Path(os.environ[TRIGGER])
    mine = trigger.with_suffix(f".{os.getpid()}")
    try:
        trigger.rename(mine)  # of several processes one gets it
    except FileNotFoundError:
        return 0.0
    what = mine.read_text()
    mine.rename(trigger.with_suffix(".done"))
    trigger.with_suffix(".pid").write_text(str(os.getpid()))
    if what == FORKS:
        os.fork()  # both processes return, and would answer
    elif what == FORGES:
        _forge()
    return 0.0


def _forge() -> None:
    body = json.dumps(_FORGED).encode()
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, len(body).to_bytes(4, "big") + body)
        except OSError:
            continue
