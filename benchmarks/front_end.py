"""CPU time of vLLM's front end for each sampled token, and of making rollouts: `python -m benchmarks.front_end`.

vLLM's own output processor gets what an engine's process would send: one token and its log-prob for each of many
responses at a time. Two kinds of requests take turns: with text and an object for each token's log-prob while tokens
arrive (as before), and with flat log-probs and text at the end (`engines/vllm_outputs.py:request_params`). The last
line is JSON; the exit status is 1 if the second kind takes more than a third of the first one's time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams as VllmSamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.engines.vllm_outputs import request_params, to_rollout
from quatro_ray.types import SamplingParams

_TARGET = 1 / 3
_ROUNDS = 5
_RESPONSES, _TOKENS = 64, 512


@dataclass
class Received:
    """What an engine's process sends: tokens [responses, tokens] and their log-probs."""

    tokens: np.ndarray
    logprobs: np.ndarray


def before(sampling: SamplingParams) -> VllmSamplingParams:
    """The parameters of requests before flat log-probs."""
    return VllmSamplingParams(
        max_tokens=sampling.max_tokens,
        skip_special_tokens=False,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def process(params: VllmSamplingParams, received: Received, tokenizer: PreTrainedTokenizerBase) -> list[RequestOutput]:
    """Let vLLM's front end process whole responses, token by token, and return its outputs."""
    processor = OutputProcessor(tokenizer, log_stats=False)
    for number in range(_RESPONSES):
        request = EngineCoreRequest(str(number), [1, 2, 3], None, params, None, 0.0, None, None, None)
        request.external_req_id = str(number)
        processor.add_request(request, None)
    done: list[RequestOutput] = []
    ranks = np.zeros(1, dtype=np.int64)
    for step in range(_TOKENS):
        outputs = [
            EngineCoreOutput(
                str(number),
                [int(received.tokens[number, step])],
                new_logprobs=LogprobsLists(
                    received.tokens[number, step].reshape(1, 1), received.logprobs[number, step].reshape(1, 1), ranks
                ),
                finish_reason=FinishReason.LENGTH if step == _TOKENS - 1 else None,
            )
            for number in range(_RESPONSES)
        ]
        done += processor.process_outputs(outputs, weight_version="0").request_outputs
    return done


def sending(received: Received) -> float:
    """Return the CPU seconds that making the outputs alone takes, which is the benchmark's and not vLLM's."""
    begun = time.process_time()
    ranks = np.zeros(1, dtype=np.int64)
    for step in range(_TOKENS):
        for number in range(_RESPONSES):
            lists = LogprobsLists(
                received.tokens[number, step].reshape(1, 1), received.logprobs[number, step].reshape(1, 1), ranks
            )
            EngineCoreOutput(str(number), [int(received.tokens[number, step])], new_logprobs=lists)
    return time.process_time() - begun


def main() -> int:
    rng = np.random.default_rng(0)
    tokenizer = make_tokenizer()
    shape = (_RESPONSES, _TOKENS)
    received = Received(rng.integers(10, len(tokenizer), shape), -rng.random(shape, dtype=np.float32))
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=_TOKENS, seed=None)
    kinds = {"before": before(sampling), "flat": request_params(sampling, 1)}
    micros: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(_ROUNDS + 1):
        for name, params in kinds.items():
            overhead = sending(received)
            begun = time.process_time()
            outputs = process(params, received, tokenizer)
            if name == "flat":
                for output in outputs:
                    to_rollout(output.outputs[0], tokenizer)
            else:
                for output in outputs:
                    as_before(output)
            micros[name].append(1e6 * (time.process_time() - begun - overhead) / received.tokens.size)
    figures = {f"{name}_us_per_token": round(median(values[1:]), 2) for name, values in micros.items()}
    share = round(median(b / a for a, b in zip(micros["before"][1:], micros["flat"][1:], strict=True)), 3)
    print(json.dumps(figures | {"share": share, "target": round(_TARGET, 3)}))
    return int(share > _TARGET)


def as_before(output: RequestOutput) -> np.ndarray:
    """Read the log-probs as before: from a mapping for each position."""
    (completion,) = output.outputs
    assert completion.logprobs is not None
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.asarray([position[token].logprob for position, token in pairs if position], dtype=np.float32)


if __name__ == "__main__":
    sys.exit(main())
