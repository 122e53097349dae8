"""The network interface that gloo and NCCL are told."""

from __future__ import annotations

import os

import pytest

from quatro_ray.actors.base import use_interface_of

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


def told() -> list[str | None]:
    return [os.environ.get(name) for name in VARIABLES]


def test_the_interface_with_the_nodes_address() -> None:
    use_interface_of("127.0.0.1")
    assert told() == ["lo", "=lo"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_interface_of("127.0.0.1")
    assert told() == ["lo", "ib0"]


def test_an_address_that_no_interface_has_leaves_the_choice_to_them() -> None:
    use_interface_of("192.0.2.1")
    assert told() == [None, None]
