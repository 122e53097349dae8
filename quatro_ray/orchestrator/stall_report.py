"""What everybody was doing when nothing moved any more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from quatro_ray.timeouts import within

_LOOK_DEADLINE_S = 10.0
FILE = "stall.txt"


async def stall_report(parts: Any, run_dir: Path, version: int) -> str:
    """Writes stacks of all actors, the ledger's counts and the engines' loads into `run_dir`; returns a short form.

    `parts`: controller.Components. Whoever does not answer a look within 10 s is reported as such: that is a finding.
    """
    engines = {f"generator {m.index} ({m.record.state})": m.client for m in parts.generators.members}
    stats, loads, learner, *stacks = await asyncio.gather(
        _look(parts.replay.stats()),
        asyncio.gather(*(_look(client.load()) for client in engines.values())),
        _look(parts.learner.stacks()),
        *(_look(client.stacks()) for client in engines.values()),
    )
    ranks = learner if isinstance(learner, list) else [learner]
    sections = {
        "ledger": stats,
        **{f"{name}: load": load for name, load in zip(engines, loads, strict=True)},
        **{f"{name}: stacks": text for name, text in zip(engines, stacks, strict=True)},
        **{f"learner rank {i}: stacks": text for i, text in enumerate(ranks)},
        "controller: tasks": "\n".join(map(str, asyncio.all_tasks())),
    }
    text = "\n\n".join(f"=== {name}\n{value}" for name, value in sections.items())
    (run_dir / FILE).write_text(text + "\n", encoding="utf-8")
    short = "; ".join(f"{name}: {load}" for name, load in zip(engines, loads, strict=True))
    return f"Ledger: {stats}; {short}; version {version}. {run_dir / FILE} has the stacks of all actors"


async def _look(work: Any) -> Any:
    try:
        return await within(_LOOK_DEADLINE_S, work)
    except TimeoutError:
        return f"does not answer within {_LOOK_DEADLINE_S:g} s: hung or stopped"
    except Exception as error:  # what keeps it from answering is what the report is for
        return f"{type(error).__name__}: {error}"
