"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket

import ray
from ray._private import ray_constants

from quatro_ray.config import Config
from quatro_ray.errors import ClusterError, last_line

_LISTENS_FOR_OTHERS = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Name of an environment variable; unless its value is 1, a cluster of one machine listens on loopback only."""
_KNOCK_S = 10.0
_STARTS = 3
_logger = logging.getLogger(__name__)


def connect(config: Config, *, show_actor_logs: bool = False) -> None:
    """Join the cluster at `cluster.address` or RAY_ADDRESS, or start one on this machine if neither is set.

    Args:
        config: only `cluster.address` is used.
        show_actor_logs: print what actors write to stdout and stderr on this process's too. Ray's session folder has
            it in any case.

    Raises:
        ClusterError: no cluster answers at the address, or none can be started.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, bool | str] = {"log_to_driver": show_actor_logs, "logging_level": "WARNING"}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **common)
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"cluster.address={address} (or RAY_ADDRESS): no cluster answers there ({last_line(error)}); correct "
                "it, or leave both out to start one on this machine"
            ) from error
        return
    if os.environ.setdefault(_LISTENS_FOR_OTHERS, "0") == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable on import; its processes read it later
    _start_here(common)


def _start_here(options: dict[str, bool | str]) -> None:
    """Start a cluster on this machine; Ray gives its own processes 30 s, which a busy machine may miss."""
    for tries_left in reversed(range(_STARTS)):
        # the end of a terminal is told to Ray's processes too, and Ray protects them from SIGINT only
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:  # Ray's is of no class of its own
            ray.shutdown()
            if not tries_left:
                raise ClusterError(
                    f"Ray did not start on this machine in {_STARTS} tries ({last_line(error)}); end other work, or "
                    "set cluster.address to a running cluster"
                ) from error
            _logger.warning("Ray did not start (%s); it is started again", last_line(error))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would keep trying for minutes."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_S).close()
