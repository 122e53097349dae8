"""Two halves of a response, sampled by two engines, are one response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput, WeightVersionSpan

from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.engines.vllm_outputs import joined, request_params, shown_text, to_rollout
from quatro_ray.types import Rollout, SamplingParams, VersionSpan


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


def tagged_tokenizer() -> Qwen2Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def flat(ids: list[int]) -> FlatLogprobs:
    logprobs = FlatLogprobs()
    for token in ids:
        logprobs.append({token: Logprob(-0.5)})
    return logprobs


def completion(ids: list[int], text: str, finish_reason: str, stop_reason: str | int | None = None) -> CompletionOutput:
    """An output as vLLM makes it."""
    return CompletionOutput(
        index=0,
        text=text,
        token_ids=ids,
        cumulative_logprob=None,
        logprobs=flat(ids),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        weight_versions=[WeightVersionSpan("0", 0, len(ids))],
    )


@pytest.mark.parametrize(
    ("text", "ending", "finish_reason", "stop_reason"),
    [
        ("<think>a</think>b", "<eos>", "stop", None),
        ("<think>a</think>b", "<pad>", "stop", 0),  # a second end token of generation_config.json
        ("<think>a</think>", "", "length", None),
        ("<think>a</think>", "", "stop", "</think>"),  # a stop string, which may be a special token
    ],
)
def test_the_text_shows_special_tokens_but_not_the_end(
    text: str, ending: str, finish_reason: str, stop_reason: str | int | None
) -> None:
    tokenizer = tagged_tokenizer()
    ids = tokenizer.encode(text + ending)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a" + "b" * text.endswith("b")
    made = to_rollout(completion(ids, tokenizer.decode(ids), finish_reason, stop_reason), tokenizer)
    assert (made.text, made.finish_reason) == (text, finish_reason)
    if not isinstance(stop_reason, str):
        assert shown_text(tokenizer, ids, finish_reason) == text


def test_log_probs_of_other_tokens_are_an_error() -> None:
    tokenizer = tagged_tokenizer()
    wrong = replace(completion([1, 2], "", "length"), logprobs=flat([1, 3]))
    with pytest.raises(RuntimeError, match="other tokens than it sampled"):
        to_rollout(wrong, tokenizer)


@pytest.mark.parametrize(("stop", "while_sampling"), [((), False), (("</think>",), True)])
def test_text_is_made_while_sampling_only_to_find_stop_strings(stop: tuple[str, ...], while_sampling: bool) -> None:
    params = request_params(SamplingParams(temperature=1.0, top_p=1.0, max_tokens=5, seed=None), 2, stop)
    assert (params.detokenize, params.flat_logprobs) == (while_sampling, True)
