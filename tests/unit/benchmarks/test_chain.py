"""Chains of thought: the rule, the reward, the demonstrations' errors, and the model at long responses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.toy import chain
from benchmarks.toy.model import ToyModel, _attend_causally, _attend_fused
from benchmarks.toy.tasks import NUM_HELD_OUT, make_task

NAMES = ["chain_60", "chain_250"]


def test_a_chain_adds_the_increments_in_turn() -> None:
    assert chain.chains(torch.tensor([[3, 5, 10]]), 6).tolist() == [[13, 18, 2, 7, 10, 15, chain.EOS]]


def test_a_chain_continues_from_its_wrong_state() -> None:
    shifts = torch.tensor([[0, 4, 0, 0, -4, 0]])
    assert chain.chains(torch.tensor([[3, 5, 10]]), 6, shifts).tolist() == [[13, 3, 6, 11, 10, 15, chain.EOS]]


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_the_rule(name: str) -> None:
    task = make_task(name)
    length = int(name.removeprefix("chain_"))
    assert task.max_response_tokens == length + 1
    for (a, b, state), answer in zip(task.prompts[:20].tolist(), task.answers[:20].tolist(), strict=True):
        expected = []
        for t in range(length):
            state = (state + (b if t % 2 else a)) % chain.NUM_SYMBOLS
            expected.append(state)
        assert answer == [*expected, task.eos]


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_held_out_and_trained_on(name: str) -> None:
    task = make_task(name)
    assert len(task.held_out_prompts) == NUM_HELD_OUT
    every = torch.cat([task.prompts, task.held_out_prompts])
    assert len(every.unique(dim=0)) == len(every) == chain.NUM_SYMBOLS**3


def test_the_last_state_alone_is_rewarded() -> None:
    task = make_task("chain_60")
    answer = task.answers[0]

    def changed(place: int, by: int = 1) -> torch.Tensor:
        response = answer.clone()
        response[place] = (response[place] + by) % chain.NUM_SYMBOLS
        return response

    early = answer.clone()
    early[-2:] = task.eos
    no_end = answer.clone()
    no_end[-1] = 0
    repaired = changed(10)
    responses = torch.stack([answer, repaired, changed(-2), early, no_end])
    assert task.rewards(responses[None], answer[None]).tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]]


def test_success_rates_spread_from_rare_to_likely() -> None:
    rates = chain.success_rates(chain.all_prompts())
    assert float(rates.min()) == pytest.approx(0.03)
    assert float(rates.max()) == pytest.approx(0.85)
    assert float(rates.mean()) == pytest.approx(0.26, abs=0.02)


@pytest.mark.parametrize("num_states", [60, 250])
@pytest.mark.parametrize("increment", [0, 9, chain.NUM_SYMBOLS - 1])
def test_demonstrations_fail_at_their_rate(num_states: int, increment: int) -> None:
    prompts = torch.tensor([[increment, 7, 4]]).expand(4000, 3)
    made = chain.demonstrations(prompts, num_states, torch.Generator().manual_seed(0))
    right_steps = torch.tensor([increment, 7]).repeat(num_states // 2)
    excess = (made[:, :-1].diff(dim=1, prepend=prompts[:, 2:]) - right_steps) % chain.NUM_SYMBOLS
    assert set(excess.unique().tolist()) == set(range(chain.NUM_SYMBOLS))
    expected = float(chain.success_rates(prompts[:1]))
    assert float((excess == 0).all(1).double().mean()) == pytest.approx(expected, abs=0.025)
    assert (made[:, -1] == chain.EOS).all()


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_of_a_task_begin_at_its_prompts(name: str) -> None:
    task = make_task(name)
    rows = torch.arange(500)
    made = task.warm_up.demonstrate(task, rows, torch.Generator().manual_seed(0))
    assert made.shape == (500, task.max_response_tokens)
    assert float((made[:, 0] == task.answers[rows, 0]).double().mean()) > 0.9


def test_what_was_sampled_is_scored_the_same_at_sixty_tokens() -> None:
    torch.manual_seed(0)
    task = make_task("chain_60")
    model = ToyModel(task.vocabulary, task.prompts.shape[1] + task.max_response_tokens)
    generator = torch.Generator().manual_seed(1)
    responses, logprobs, counted = model.sample(task.prompts[:4], 3, task.max_response_tokens, task.eos, generator)
    scored = model.score(task.prompts[:4], responses).gather(-1, responses[..., None])[..., 0]
    torch.testing.assert_close(torch.where(counted, scored, 0.0), logprobs, rtol=1e-4, atol=1e-5)


def test_fused_attention_is_the_same_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 40, 8, generator=generator)
    keys, values = torch.randn(2, 2, 2, 3, 8, generator=generator)
    expected = _attend_causally(q, k, v, (keys, values), 2)
    torch.testing.assert_close(_attend_fused(q, k, v, (keys, values), 2), expected)
