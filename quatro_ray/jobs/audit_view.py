"""The result of an audit as text."""

from __future__ import annotations

from collections.abc import Iterator

from quatro_ray.jobs.audit import Audit, Fate
from quatro_ray.types import GroupState

_MAX_SHOWN = 20
"""Findings of one check that are shown; --json has all."""
_UNKNOWN = "–"


def view(audit: Audit) -> str:
    """Return the tables and the findings, one line each."""
    return "\n".join([*_head(audit), "", *_groups(audit), "", *_fates(audit), "", *_findings(audit)])


def _head(audit: Audit) -> Iterator[str]:
    yield f"{audit.run_dir}: {audit.state}, step {audit.step} of {audit.num_steps}, version {audit.version}"
    yield f"compared with the ledger: the records of {audit.num_compared} steps"
    how = "by the SHA-256 of their files" if audit.is_thorough else "by the sizes of their files; --deep reads them"
    steps = f"{', '.join(map(str, audit.checkpoints))} ({how})" if audit.checkpoints else "none"
    yield f"checkpoints that are whole in {audit.checkpoint_dir}: {steps}"


def _groups(audit: Audit) -> Iterator[str]:
    total = sum(audit.groups.values())
    yield f"{'groups':<24}{total:>12,}"
    for state in [*GroupState, *sorted(audit.groups.keys() - set(GroupState))]:
        if num := audit.groups.get(state, 0):
            yield f"  {state:<22}{num:>12,}"


def _fates(audit: Audit) -> Iterator[str]:
    total = sum(audit.groups.values())
    yield f"{'of these':<24}{'groups':>12}{'share':>10}{'response tokens':>24}{'pass rate':>12}"
    yield _fate("trained", audit.trained, total, None)
    for reason, fate in audit.dropped.items():
        yield _fate(f"dropped: {reason}", fate, total, audit.trained.response_tokens)


def _fate(name: str, fate: Fate, total: int, trained_length: float | None) -> str:
    share = f"{fate.num_groups / total:.1%}" if total else _UNKNOWN
    length = _UNKNOWN if fate.response_tokens is None else f"{fate.response_tokens:,.1f}"
    if fate.response_tokens is not None and trained_length:
        length += f" ({fate.response_tokens / trained_length - 1:+.0%})"
    rate = _UNKNOWN if fate.pass_rate is None else f"{fate.pass_rate:.3f}"
    return f"  {name:<22}{fate.num_groups:>12,}{share:>10}{length:>24}{rate:>12}"


def _findings(audit: Audit) -> Iterator[str]:
    num = sum(map(len, audit.findings.values()))
    if not num:
        yield "clean: nothing is lost, doubled or inconsistent"
        return
    yield f"{num} findings"
    for check, found in audit.findings.items():
        for what in found[:_MAX_SHOWN]:
            yield f"  {check}: {what}"
        if len(found) > _MAX_SHOWN:
            yield f"  {check}: and {len(found) - _MAX_SHOWN:,} more"
