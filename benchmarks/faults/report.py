"""Statistics of all faults, as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.faults.watch import Outcome

_HEAD = ("fault", "injected", "detected in s", "recovered in s", "groups requeued", "lost", "duplicated", "orphans")


def figures(outcomes: Sequence[Outcome], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return statistics of each kind, injected or not. Seconds are [median, maximum], None if there are none."""
    return {kind: _of([o for o in outcomes if o.kind == kind]) for kind in kinds}


def _of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "injected": len(outcomes),
        "detected_s": _spread([o.detected_s for o in outcomes]),
        "recovered_s": _spread([o.recovered_s for o in outcomes]),
        "not_detected": sum(o.detected_s is None for o in outcomes),
        "not_recovered": sum(o.recovered_s is None for o in outcomes),
        "requeued": sum(o.requeued for o in outcomes),
        "lost": sum(o.lost for o in outcomes),
        "duplicated": sum(o.duplicated for o in outcomes),
        "orphans": sum(len(o.orphans) for o in outcomes),
        "problems": [p for o in outcomes for p in o.problems],
    }


def _spread(seconds: Sequence[float | None]) -> list[float] | None:
    known = [s for s in seconds if s is not None]
    return [round(statistics.median(known), 1), round(max(known), 1)] if known else None


def table(by_kind: dict[str, dict[str, Any]]) -> str:
    rows = [_HEAD, *(_row(kind, of) for kind, of in by_kind.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(kind: str, of: dict[str, Any]) -> tuple[str, ...]:
    counts = (of["requeued"], of["lost"], of["duplicated"], of["orphans"])
    times = (_shown(of["detected_s"], of["not_detected"]), _shown(of["recovered_s"], of["not_recovered"]))
    return (kind, str(of["injected"]), *times, *map(str, counts))


def _shown(spread: list[float] | None, never: int) -> str:
    text = f"{spread[0]:.1f}, {spread[1]:.1f}" if spread else "–"
    return f"{text} ({never} never)" if never else text
