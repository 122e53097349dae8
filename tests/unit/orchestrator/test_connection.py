"""What is wrong with a cluster is said before anything starts."""

import socket

import pytest

from quatro_ray.errors import ClusterError
from quatro_ray.orchestrator.connection import connect
from tests.make import config


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"cluster.address={address} .*: no cluster answers there .*refused"):
            connect(config(cluster={"address": address}))
