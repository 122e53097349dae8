"""The state of a run as text that fits on one screen."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from quatro_ray.jobs.status import ENDED, RECENT_S, Member, Pace, Status, read_status
from quatro_ray.telemetry.activity import CONTROLLER, IDLE
from quatro_ray.types import GroupState

_MAX_MEMBERS = 8
"""Members of a role that get a line each; of more, the states are counted."""
_MAX_FAULTS = 5
_QUEUES = (GroupState.PENDING, GroupState.READY, GroupState.LEASED)
_LABEL = 14


def show_status(run_dir: Path, *, as_json: bool, every_s: float | None, console: Console | None = None) -> None:
    """Print the state of a run, in place if it is shown again on a terminal.

    Args:
        run_dir: directory of the run.
        as_json: print a JSON object in one line.
        every_s: seconds until it is shown again, as long as the run is in progress; None: show it once.
        console: where it is shown in place; by default stdout.

    Raises:
        ConfigError: as `read_status` raises it.
    """
    console = console or Console(highlight=False)
    in_place = every_s is not None and console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        while True:
            status = read_status(run_dir)
            text = json.dumps(status.record()) if as_json else view(status)
            if live is not None:
                live.update(Text(text), refresh=True)
            else:
                print(text, flush=True)
            if every_s is None or status.state in ENDED:
                return
            time.sleep(every_s)


def view(status: Status) -> str:
    """Return the state in some 20 lines."""
    return "\n".join(f"{label:<{_LABEL}}{text}" for label, text in [*_head(status), *_doing(status), *_numbers(status)])


def _head(status: Status) -> Iterator[tuple[str, str]]:
    quiet = f"last record {_clock(status.last_record_at, status.at)}" if status.last_record_at else "no record yet"
    yield "run", f"{status.run_dir}: {status.state}, {quiet}"
    of = f" of {status.num_steps}" if status.num_steps is not None else ""
    version = "unknown" if status.version is None else status.version
    ago = f", {_duration(max(0.0, status.at - status.last_step_at))} ago" if status.last_step_at is not None else ""
    yield "step", f"{status.step}{of}{ago}, version {version}"
    if status.end_at is not None:
        yield "end", f"about {_date(status.end_at)}, in {_duration(status.end_at - status.at)}"
    if status.state == "ended" and status.last_note:
        yield "last note", status.last_note


def _doing(status: Status) -> Iterator[tuple[str, str]]:
    if status.doing_at is None:
        return
    if status.state in ENDED:
        yield "", f"when the process died, {_clock(status.doing_at, status.at)}:"
    by_role: dict[str, list[Member]] = {}
    for member in status.doing:
        by_role.setdefault(member.name.split()[0], []).append(member)
    for role, members in by_role.items():
        if role == CONTROLLER and all(m.state == IDLE for m in members):
            continue
        yield from _role(role, members)


def _role(role: str, members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    if len(members) <= _MAX_MEMBERS:
        for member in members:
            yield member.name, f"{member.state} for {_duration(member.seconds)}{_load(member)}"
        return
    states = ", ".join(f"{num:,} {state}" for state, num in Counter(m.state for m in members).most_common())
    longest = max((m for m in members if m.state != IDLE), key=lambda m: m.seconds, default=members[0])
    yield f"{role}s", f"{states}; longest: {longest.name} {longest.state} for {_duration(longest.seconds)}"


def _load(member: Member) -> str:
    if member.num_running is None:
        return ""
    cache = f", key-value cache {member.kv_cache_usage:.0%}" if member.kv_cache_usage is not None else ""
    return f", {member.num_running} groups{cache}"


def _numbers(status: Status) -> Iterator[tuple[str, str]]:
    if status.ledger_problem is not None:
        yield "ledger", status.ledger_problem
    if status.groups:
        queues = ", ".join(f"{status.groups.get(state, 0):,} {state}" for state in _QUEUES)
        yield "queues", f"{queues} (groups)"
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(status.drops.items()))
        trained = f"{status.groups.get(GroupState.TRAINED, 0):,} trained"
        yield "groups", f"{trained}, {sum(status.drops.values()):,} dropped{f' ({dropped})' if dropped else ''}"
    if status.pace is not None:
        yield from _pace(status.pace)
    total = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in sorted(status.faults.items()))
    yield "faults", total or "none"
    if status.recent_faults:
        yield "", f"in the last {_duration(RECENT_S)}: {len(status.recent_faults)}"
    for event in status.recent_faults[-_MAX_FAULTS:]:
        why = f" ({event['why']})" if event.get("why") else ""
        text = f"{event['part']} {event['event'].replace('_', ' ')}{why}"
        yield "", f"  {_clock(event['clock_s'], status.at)}: {text[:120]}"
    for name, num in status.unreadable.items():
        yield "left out", f"{num:,} lines of {name}, which cannot be read"


def _pace(pace: Pace) -> Iterator[tuple[str, str]]:
    tokens = [
        f"{rate:,.0f} tokens/s {what}"
        for what, rate in (("generated", pace.generated_tokens_per_s), ("trained", pace.trained_tokens_per_s))
        if rate is not None
    ]
    speed = [f"{pace.steps_per_min:.3g} steps/min", f"{_duration(pace.step_s)} a step", *tokens]
    yield "rates", f"{', '.join(speed)} (last {pace.num_steps} steps)"
    if pace.reward is not None:
        yield "reward", f"{pace.reward:.3f}"
    if pace.staleness is not None:
        most = f", at most {pace.max_staleness:.0f}" if pace.max_staleness is not None else ""
        yield "staleness", f"{pace.staleness:.1f} steps{most}"


def _clock(at: float, now: float) -> str:
    """Return a time in the local zone, and how long ago it was."""
    return f"{_date(at)} ({_duration(max(0.0, now - at))} ago)"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
