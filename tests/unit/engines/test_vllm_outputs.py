"""Two halves of a response, sampled by two engines, are one response."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quatro_ray.engines.vllm_outputs import joined
from quatro_ray.types import Rollout, VersionSpan


def half(versions: list[int], first_token: int = 0, finish_reason: str = "") -> Rollout:
    """One token for each of `versions`; spans as vLLM makes them: as long as they can be."""
    spans: list[VersionSpan] = []
    for i, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, i + 1)
        else:
            spans.append(VersionSpan(version, i, i + 1))
    tokens = np.arange(first_token, first_token + len(versions), dtype=np.int32)
    return Rollout(tokens, -tokens.astype(np.float32), tuple(spans), "", finish_reason)


def spans(rollout: Rollout) -> list[tuple[int, int, int]]:
    return [(s.version, s.start, s.end) for s in rollout.spans]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([3, 3], [3], [(3, 0, 3)]),
        ([3, 3], [4], [(3, 0, 2), (4, 2, 3)]),
        ([3, 4], [4, 4, 5], [(3, 0, 1), (4, 1, 4), (5, 4, 5)]),
        ([], [4, 5], [(4, 0, 1), (5, 1, 2)]),
        ([4, 5], [], [(4, 0, 1), (5, 1, 2)]),
        ([], [], []),
    ],
)
def test_spans_meet_without_a_seam(before: list[int], after: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert spans(joined(half(before), half(after), "both")) == expected


ascending = st.lists(st.integers(0, 4), max_size=12).map(sorted)


@given(ascending, st.integers(0, 12))
def test_where_the_engine_died_does_not_show(versions: list[int], cut: int) -> None:
    whole = half(versions, finish_reason="length")
    first, rest = half(versions[:cut]), half(versions[cut:], len(versions[:cut]), "length")
    found = joined(first, rest, "text of both")
    assert spans(found) == spans(whole)
    assert found.token_ids.tolist() == whole.token_ids.tolist() and found.token_ids.dtype == np.int32
    assert found.behavior_logprobs.tolist() == whole.behavior_logprobs.tolist()
    assert (found.text, found.finish_reason) == ("text of both", "length")
