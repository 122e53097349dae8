"""Converts groups to bytes and back: safetensors for the arrays, JSON for the rest, so that reading runs no code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from quatro_ray.types import Outcome, Query, Rollout, RolloutGroup, Score, VersionSpan


def to_bytes(group: RolloutGroup) -> bytes:
    """Return the group as bytes, for the ledger."""
    header = {
        "group_id": group.group_id,
        "query": vars(group.query),
        "rollouts": [_header(r) for r in group.rollouts],
    }
    arrays: dict[str, np.ndarray] = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "prompt_token_ids": group.prompt_token_ids,
        "token_ids": np.concatenate([r.token_ids for r in group.rollouts]),
        "behavior_logprobs": np.concatenate([r.behavior_logprobs for r in group.rollouts]),
        "sampled": _sampled(group),
    }
    return save(arrays)


def from_bytes(data: bytes) -> RolloutGroup:
    """Return the group that `to_bytes` converted."""
    arrays = load(data)
    header = json.loads(arrays["header"].tobytes())
    all_sampled = bool(arrays["sampled"].all())
    rollouts, end = [], 0
    for of_rollout in header["rollouts"]:
        start, end = end, end + of_rollout["num_tokens"]
        sampled = None if all_sampled else arrays["sampled"][start:end]
        rollouts.append(
            _rollout(of_rollout, arrays["token_ids"][start:end], arrays["behavior_logprobs"][start:end], sampled)
        )
    return RolloutGroup(header["group_id"], Query(**header["query"]), arrays["prompt_token_ids"], tuple(rollouts))


def _sampled(group: RolloutGroup) -> np.ndarray:
    if all(r.sampled is None for r in group.rollouts):
        return np.ones(sum(r.num_tokens for r in group.rollouts), dtype=np.bool_)
    return np.concatenate([r.is_sampled() for r in group.rollouts])


def _header(rollout: Rollout) -> dict[str, Any]:
    return {
        "num_tokens": rollout.num_tokens,
        "spans": [[s.version, s.start, s.end] for s in rollout.spans],
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
        "transcript": rollout.transcript,
        "environment": dict(rollout.environment),
        "score": _score(rollout.score) if rollout.score else None,
    }


def _score(score: Score) -> dict[str, Any]:
    # ledgers store the values of the rewards under the name "parts"
    values = dict(score.reward_values)
    return {"reward": score.reward, "outcome": score.outcome, "detail": score.detail, "parts": values}


def _rollout(
    header: dict[str, Any], token_ids: np.ndarray, logprobs: np.ndarray, sampled: np.ndarray | None
) -> Rollout:
    score = header["score"]
    return Rollout(
        token_ids=token_ids,
        behavior_logprobs=logprobs,
        spans=tuple(VersionSpan(*s) for s in header["spans"]),
        text=header["text"],
        finish_reason=header["finish_reason"],
        sampled=None if sampled is None or sampled.all() else sampled,
        transcript=header["transcript"],
        environment=header["environment"],
        score=Score(score["reward"], Outcome(score["outcome"]), score["detail"], score["parts"]) if score else None,
    )


def readable(group: RolloutGroup) -> dict[str, Any]:
    """Return texts, versions and rewards of a group as JSON values, for rollouts.jsonl."""
    return {
        "group_id": group.group_id,
        "source": group.query.source,
        "prompt": group.query.prompt,
        "answer": group.query.answer,
        "rollouts": [
            {
                "text": r.text,
                "reward": r.score.reward if r.score else None,
                "outcome": str(r.score.outcome) if r.score else None,
                "parts": dict(r.score.reward_values) if r.score else {},
                "versions": [[s.version, s.start, s.end] for s in r.spans],
                "num_tokens": r.num_tokens,
                **({"num_turns": r.num_turns, "transcript": r.transcript} if r.transcript else {}),
                "finish_reason": r.finish_reason,
                "mean_logprob": float(r.behavior_logprobs[r.is_sampled()].mean()),
            }
            for r in group.rollouts
        ],
    }
