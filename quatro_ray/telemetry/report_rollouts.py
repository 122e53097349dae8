"""Shows sampled groups as text that a person reads: the prompt, then each response with its reward."""

from __future__ import annotations

import html

from quatro_ray.telemetry.run_files import Record

_MAX_CHARACTERS = 8000
_NUM_OPEN = 2
_ENDS = {"stop": "ended by itself", "length": "truncated"}


def rollouts(group: Record) -> str:
    """Return a group of rollouts.jsonl as HTML; the first responses are unfolded."""
    source = f", source {group['source']}" if group.get("source") else ""
    title = html.escape(f"Step {group.get('step', '?')}, group {group.get('group_id', '?')}{source}")
    answer = f"<p>Answer: <b>{html.escape(str(group['answer']))}</b></p>" if group.get("answer") else ""
    responses = group.get("rollouts", [])
    shown = "".join(_response(r, i, is_open=i < _NUM_OPEN) for i, r in enumerate(responses))
    return f"<article><h3>{title}</h3>{_text(group.get('prompt', ''))}{answer}{shown}</article>"


def _response(rollout: Record, index: int, *, is_open: bool) -> str:
    summary = html.escape(f"Response {index + 1}: {', '.join(_facts(rollout))}")
    text = _text(rollout.get("transcript") or rollout.get("text") or "")
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{text}</details>"


def _facts(rollout: Record) -> list[str]:
    reward, parts = rollout.get("reward"), rollout.get("parts") or {}
    facts = ["no reward" if reward is None else f"reward {reward:.4g}"]
    if len(parts) > 1:
        facts[0] += f" ({', '.join(f'{name} {value:.4g}' for name, value in parts.items())})"
    if rollout.get("outcome") not in (None, "ok"):
        facts.append(f"scoring: {rollout['outcome']}")
    if "num_tokens" in rollout:
        facts.append(f"{rollout['num_tokens']:,} tokens")
    if "num_turns" in rollout:
        facts.append(f"{rollout['num_turns']} turns")
    if rollout.get("finish_reason"):
        facts.append(_ENDS.get(rollout["finish_reason"], str(rollout["finish_reason"])))
    if versions := rollout.get("versions"):
        first, last = versions[0][0], versions[-1][0]
        facts.append(f"version {first}" if first == last else f"versions {first} to {last}")
    return facts


def _text(text: str) -> str:
    """Return text with its line ends; of a very long one, the beginning and the end."""
    if not text:
        return "<pre><i>(empty)</i></pre>"
    if (num_left_out := len(text) - _MAX_CHARACTERS) > 0:
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]}\n… {num_left_out:,} characters left out …\n{text[-half:]}"
    return f"<pre>{html.escape(text)}</pre>"
