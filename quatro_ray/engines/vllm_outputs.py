"""Requests to vLLM, and conversion of its outputs to rollouts, with what an engine that died had sampled so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from quatro_ray.types import Rollout, SamplingParams, VersionSpan

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM


class _FlatLogprobs(Protocol):
    """vLLM's log-probs of a response in lists of numbers: an object for each token would cost more than sampling it."""

    token_ids: list[int]
    logprobs: list[float]


class _Span(Protocol):
    version: str
    start: int
    end: int


class Decoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of the tokens."""
        ...


def request_params(sampling: SamplingParams, n: int, stop: Sequence[str] = ()) -> VllmSamplingParams:
    """Return vLLM's parameters of a request for n responses.

    Text is made while tokens arrive only if a stop string has to be found in it; otherwise once, at the end.
    """
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        n=n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop=list(stop) or None,
        include_stop_str_in_output=True,
        skip_special_tokens=False,  # tags that rewards and stop strings look for may be special tokens
        detokenize=bool(stop),
        logprobs=0,  # only the sampled token's
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def shown_text(decoder: Decoder, token_ids: Sequence[int], finish_reason: str | None) -> str:
    """Return the text of a response without the token that ended it; tags such as `<think>` may be special tokens.

    Args:
        decoder: the tokenizer.
        token_ids: [T], the whole response.
        finish_reason: of a response without stop strings, so that "stop" means an end token.
    """
    shown = token_ids[:-1] if finish_reason == "stop" else token_ids
    return decoder.decode([int(token) for token in shown], skip_special_tokens=False)


def to_rollout(completion: CompletionOutput, decoder: Decoder) -> Rollout:
    """Return a finished response; its text shows all tokens but the one that ended it."""
    assert completion.logprobs is not None and completion.weight_versions is not None
    rollout = _rollout(completion.token_ids, cast("_FlatLogprobs", completion.logprobs), completion.weight_versions)
    if isinstance(completion.stop_reason, str):
        text = completion.text  # ends with the stop string, which is shown
    else:
        text = shown_text(decoder, completion.token_ids, completion.finish_reason)
    return replace(rollout, text=text, finish_reason=completion.finish_reason or "")


def _rollout(token_ids: Sequence[int], logprobs: _FlatLogprobs | None, versions: Iterable[_Span]) -> Rollout:
    """Make an unfinished rollout without text.

    Args:
        token_ids: [T], the sampled tokens.
        logprobs: of these tokens alone; None if there is no token.
        versions: vLLM's spans, covering [0, T).

    Raises:
        RuntimeError: vLLM's log-probs are not those of the sampled tokens.
    """
    values = logprobs.logprobs if logprobs else []
    if logprobs and list(token_ids) != logprobs.token_ids:
        raise RuntimeError("vLLM returned log-probs of other tokens than it sampled")
    return Rollout(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        behavior_logprobs=np.asarray(values, dtype=np.float32),
        spans=tuple(VersionSpan(int(s.version), s.start, s.end) for s in versions),
        text="",
        finish_reason="",
    )


def sampled_so_far(llm: AsyncLLM, request_id: str, n: int) -> tuple[Rollout, ...]:
    """Return the n rollouts of a request whose engine died, in order; empty if nothing was sampled.

    Rollouts without a finish_reason have to be continued. vLLM's front end, in this process, has every token that the
    engine's process sent. It returns log-probs and versions only for finished requests, so they are read from its
    internal records.
    """
    states = [s for s in llm.output_processor.request_states.values() if s.external_req_id == request_id]
    rollouts = [_rollout([], None, [])] * n
    for state in states:
        assert state.detokenizer is not None and state.logprobs_processor is not None
        tokens = state.detokenizer.output_token_ids
        logprobs = cast("_FlatLogprobs | None", state.logprobs_processor.logprobs or None)
        rollouts[state.request_index] = _rollout(tokens, logprobs, state._weight_version_spans() or [])
    parents = [s.parent_req for s in states if s.parent_req is not None]
    for done in parents[0].output_aggregator if parents else []:
        if done is not None:
            rollouts[done.index] = to_rollout(done, llm.get_tokenizer())
    return tuple(rollouts) if any(r.num_tokens for r in rollouts) else ()


def joined(first: Rollout, rest: Rollout, text: str) -> Rollout:
    """Append `rest` to `first`.

    Args:
        first: the beginning, whose finish_reason is empty.
        rest: its spans count from its own first token.
        text: text of the whole rollout.
    """
    shift = first.num_tokens
    spans = [*first.spans, *(VersionSpan(s.version, s.start + shift, s.end + shift) for s in rest.spans)]
    if first.spans and rest.spans and first.spans[-1].version == rest.spans[0].version:
        middle = VersionSpan(rest.spans[0].version, first.spans[-1].start, rest.spans[0].end + shift)
        spans = [*first.spans[:-1], middle, *spans[len(first.spans) + 1 :]]
    return Rollout(
        token_ids=np.concatenate([first.token_ids, rest.token_ids]),
        behavior_logprobs=np.concatenate([first.behavior_logprobs, rest.behavior_logprobs]),
        spans=tuple(spans),
        text=text,
        finish_reason=rest.finish_reason,
    )
