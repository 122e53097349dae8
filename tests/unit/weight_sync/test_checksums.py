"""Checksums see every bit of a tensor and where it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quatro_ray.weight_sync import checksums
from quatro_ray.weight_sync.checksums import ChecksumWorker, tensor_checksum


def test_dtype_shape_and_the_formula() -> None:
    assert tensor_checksum(torch.tensor([[5, 7, 9]], dtype=torch.int32)) == f"int32 1x3 {5 * 1 + 7 * 3 + 9 * 5}"
    assert tensor_checksum(torch.tensor(-1.0)) == f"float32  {(0xBF800000 - 2**32) % 2**64}"
    assert tensor_checksum(torch.ones(0, dtype=torch.bfloat16)) == "bfloat16 0 0"


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=9), st.data())
def test_a_change_of_one_element_shows(bits: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(bits) - 1))
    other = data.draw(st.integers(-(2**15), 2**15 - 1).filter(lambda value: value != bits[index]))
    before = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    after = torch.tensor([*bits[:index], other, *bits[index + 1 :]], dtype=torch.int16).view(torch.bfloat16)
    assert tensor_checksum(before) != tensor_checksum(after)


def test_what_two_elements_hold_must_not_be_exchanged() -> None:
    assert tensor_checksum(torch.tensor([1.0, 2.0])) != tensor_checksum(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_chunks_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = torch.arange(60).reshape(6, 10).to(dtype)
    whole = tensor_checksum(tensor)
    monkeypatch.setattr(checksums, "_CHUNK", 7)
    assert tensor_checksum(tensor) == tensor_checksum(tensor.T.contiguous().T) == whole


def test_a_worker_names_its_parameters() -> None:
    worker = ChecksumWorker()
    worker.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(3, 2))
    assert {name: value.rsplit(" ", 1)[0] for name, value in worker.parameter_checksums().items()} == {
        "weight": "float32 2x3",
        "bias": "float32 2",
    }
