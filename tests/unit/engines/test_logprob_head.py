"""Chunked log-probs equal the plain ones, values and gradients, whatever the chunk."""

import pytest
import torch

from quatro_ray.engines.logprob_head import LogitTransform, chunked_logprobs


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_a_plain_log_softmax(chunk: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=g)
    upstream = torch.randn(7, generator=g)

    plain = torch.log_softmax(hidden @ weight.T / temperature, -1)
    expected = plain.gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    got, entropy = chunked_logprobs(hidden, weight, targets, temperature, chunk)
    grads = torch.autograd.grad((got * upstream).sum(), (hidden, weight))

    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_entropy_has_its_gradient(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=g, requires_grad=True) for size in ((7, 5), (11, 5), (11,)))
    targets = torch.randint(0, 11, (7,), generator=g)
    first, second = torch.randn(2, 7, generator=g)
    transform = LogitTransform(scale=0.5, cap=2.0)
    plain = torch.log_softmax(2 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 2) / 0.7, -1)
    logprobs, entropy = plain.gather(1, targets[:, None]).squeeze(1), -(plain.exp() * plain).sum(-1)
    got = chunked_logprobs(hidden, weight, targets, 0.7, chunk, bias=bias, transform=transform)
    inputs = (hidden, weight, bias)
    for of_logprobs in (first, torch.zeros(7)):
        expected = torch.autograd.grad((logprobs * of_logprobs + entropy * second).sum(), inputs, retain_graph=True)
        found = torch.autograd.grad((got[0] * of_logprobs + got[1] * second).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, expected)
    alone = torch.autograd.grad((entropy * second).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((got[1] * second).sum(), inputs), alone)


def test_bias_scale_and_cap_have_their_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=g, requires_grad=True) for size in ((7, 5), (11, 5), (11,)))
    targets = torch.randint(0, 11, (7,), generator=g)
    upstream = torch.randn(7, generator=g)
    transform = LogitTransform(scale=0.5, cap=2.0)

    plain = torch.log_softmax(2 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 2) / 0.7, -1)
    expected = plain.gather(1, targets[:, None]).squeeze(1)
    got, _ = chunked_logprobs(hidden, weight, targets, 0.7, 3, bias=bias, transform=transform)
    torch.testing.assert_close(got, expected)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad((got * upstream).sum(), inputs), torch.autograd.grad((expected * upstream).sum(), inputs)
    )


def test_no_tensor_of_all_tokens_by_all_words_exists() -> None:
    """Counts what autograd keeps and what each chunk makes: nothing as large as [N, V]."""
    n, v, chunk = 64, 1000, 4
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        logprobs, _ = chunked_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), 1.0, chunk)
        logprobs.sum().backward()
    assert largest == max(chunk * v, weight.numel()) < n * v


def test_the_logits_of_a_chunk_exist_once() -> None:
    """Counts tensors of [C, V] that are made: one for each chunk, in each direction; the rest happens in place."""
    n, v, chunk = 512, 300, 256
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    made = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal made
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= chunk * v:
                    made += tensor.untyped_storage().data_ptr() not in given
            return out

    with Watch():
        logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), 0.7, chunk)
        assert made == 2
        (logprobs + entropy).sum().backward()
    assert made == 4


def test_logits_are_not_rounded_to_the_dtype_of_the_weights() -> None:
    """Logits of 1,000 and 1,001 are the same number in bfloat16."""
    hidden = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[1000.0, 0.0], [1000.0, 1.0]], dtype=torch.bfloat16)
    logprobs, _ = chunked_logprobs(hidden, weight, torch.tensor([1]), 1.0, 8)
    assert float(logprobs) == pytest.approx(-0.3133, abs=1e-3)
