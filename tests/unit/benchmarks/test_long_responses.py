"""The task of the benchmark on the whole system."""

from __future__ import annotations

import torch

from benchmarks.long_responses import NUM_STATES, NUM_SYMBOLS, ends_right, prompt_text, response_text
from benchmarks.toy.chain import all_prompts, chains
from quatro_ray.types import Query, Response


def test_a_chain_in_letters() -> None:
    prompt = torch.tensor([[3, 1, 8]])
    states = chains(prompt, NUM_STATES, num_symbols=NUM_SYMBOLS)[0, :-1]
    assert prompt_text(prompt[0]) == "dBI="
    assert response_text(states).startswith("bCfG")  # 8 + 3 = 1, + 1 = 2, + 3 = 5, + 1 = 6, modulo 10


def test_prompts_differ_and_only_the_last_state_of_a_whole_chain_is_rewarded() -> None:
    prompts = all_prompts(NUM_SYMBOLS)
    assert len({prompt_text(p) for p in prompts}) == NUM_SYMBOLS**3
    text = response_text(chains(prompts[:1], NUM_STATES, num_symbols=NUM_SYMBOLS)[0, :-1])
    query = Query("0", prompt_text(prompts[0]), text[-1])

    def reward(answer: str) -> float:
        return ends_right(query, Response(answer, num_tokens=len(answer) + 1, truncated=False))

    assert reward(text) == 1
    assert reward("j" + text[1:]) == 1
    assert reward(text[:-1]) == reward(text + text[-1]) == reward(text[:-1] + "Z") == 0
