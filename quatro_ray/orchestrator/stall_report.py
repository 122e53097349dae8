"""Reports what every component was doing when the run stalled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

from quatro_ray.orchestrator.components import Components
from quatro_ray.timeouts import within

_LOOK_DEADLINE_S = 10.0
FILE = "stall.txt"


async def stall_report(components: Components, run_dir: Path, version: int) -> str:
    """Write stacks of engines and learner ranks, the ledger's counts and the engines' loads; return a summary.

    A component that does not answer within 10 s is reported as such.

    Args:
        components: the run's components, of which generators, learner and replay buffer are asked.
        run_dir: folder for the report.
        version: the policy version of the engines.
    """
    engines = {f"generator {m.index} ({m.record.state})": m.client for m in components.generators.slots}
    (stats, learner), loads, stacks = await asyncio.gather(
        asyncio.gather(_look(components.replay.stats()), _look(components.learner.stacks())),
        asyncio.gather(*(_look(client.load()) for client in engines.values())),
        asyncio.gather(*(_look(client.stacks()) for client in engines.values())),
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
    return f"Ledger: {stats}; {short}; version {version}. {run_dir / FILE} has the stacks of engines and learner ranks"


async def _look(work: Awaitable[object]) -> object:
    try:
        return await within(_LOOK_DEADLINE_S, work)
    except TimeoutError:
        return f"does not answer within {_LOOK_DEADLINE_S:g} s: hung or stopped"
    except Exception as error:  # the report shows why the component does not answer
        return f"{type(error).__name__}: {error}"
