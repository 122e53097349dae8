"""Reserves the resources of a run, and puts each actor into its bundle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quatro_ray.config import Config
from quatro_ray.errors import ClusterError
from quatro_ray.orchestrator.resources import Bundle, placement_groups
from quatro_ray.orchestrator.startup import SAY_EVERY_S

_LOOK_EVERY_S = 1.0
_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Place:
    """The place of an actor.

    Attributes:
        group: a placement group.
        position: that of the actor's bundle in the group.
        resources: what the actor takes of its bundle.
    """

    group: PlacementGroup
    position: int
    resources: Mapping[str, float]


class Placer:
    """Puts an actor of a role into its bundle, with the environment variables of that role."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._places: dict[tuple[str, int], _Place] = {}

    @classmethod
    async def reserve(cls, config: Config, plan: Sequence[Bundle], say: Callable[[str], None]) -> Placer:
        """Reserve the resources of the plan.

        All of it is requested at once and before anything else starts, so that an autoscaler sees the whole demand.

        Args:
            config: the whole configuration; `cluster.start_deadline_s` bounds the wait for nodes and free resources.
            plan: the bundles, which orchestrator/resources.py:placement_groups divides into groups.
            say: shows what is missing while it waits.

        Raises:
            ClusterError: the resources do not become free within the deadline, or this process has started the cluster
                itself, and it is too small.
        """
        need = [bundle.resources for bundle in plan]
        if _is_own_cluster() and (lack := missing(need, ray.cluster_resources(), _nodes())):
            raise ClusterError(f"{lack}: {_REMEDY}")
        placer = cls(config)
        for bundles in placement_groups(plan):
            placer.add(bundles, placement_group([bundle.resources for bundle in bundles], strategy="PACK"))
        try:
            await _wait(placer.groups(), need, config.cluster.start_deadline_s, say)
        except BaseException:
            placer.release()
            raise
        return placer

    def add(self, bundles: Sequence[Bundle], group: PlacementGroup) -> None:
        """Put the actors of these bundles into a placement group, whose bundles are in the same order."""
        for position, bundle in enumerate(bundles):
            for role, resources in bundle.by_role().items():
                self._places[role, bundle.index] = _Place(group, position, resources)

    def group_of(self, role: str, index: int) -> PlacementGroup | None:
        """Return the placement group of an actor, or None if it has none yet."""
        place = self._places.get((role, index))
        return None if place is None else place.group

    def forget(self, role: str, index: int) -> PlacementGroup | None:
        """Forget the place of an actor that will not start again.

        Returns:
            its placement group if no other actor has a place in it; the caller removes it.
        """
        place = self._places.pop((role, index))
        return None if place.group.id in {other.group.id for other in self._places.values()} else place.group

    def groups(self) -> list[PlacementGroup]:
        """Return all placement groups."""
        return list({place.group.id: place.group for place in self._places.values()}.values())

    def release(self) -> None:
        """Give the resources back; what still runs in them is killed."""
        for group in self.groups():
            remove_placement_group(group)

    def __call__(self, actor_class: Any, role: str, index: int, **options: object) -> Any:
        """Return the class, or remote function, with the options of a bundle; call `remote` on it to start it."""
        place = self._places[role, index]
        return actor_class.options(
            num_cpus=place.resources.get("CPU", 0),
            num_gpus=place.resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(place.group, place.position),
            runtime_env={"env_vars": self._environment(role)},
            **options,
        )

    def _environment(self, role: str) -> dict[str, str]:
        env = {"OMP_NUM_THREADS": str(self.config.cluster.threads_per_process), "VLLM_LOGGING_LEVEL": "WARNING"}
        if self.config.cluster.device == "cpu":
            # binding to cores would put all processes of a small machine onto the same ones
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # vLLM compiles a helper for the first request otherwise: 20 s for nothing on a small model
            env["TORCHDYNAMO_DISABLE"] = "1"
            env["CUDA_VISIBLE_DEVICES"] = ""
        elif role == "learner" and self.config.sync_backend != "ipc":
            # rows of changing widths would leave holes in the GPU's memory that nothing fits into; but handles of such
            # segments, which ipc sends, need rights on other processes that containers do not have
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        elif role == "generator" and self.config.sync_backend == "ipc":
            # vLLM pickles the handles on their way from the actor to its own child process
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        return env


_REMEDY = (
    "lower cluster.cpus_per_*, the number of engines, ranks or verifiers, or add nodes (`quatro-ray plan` shows what "
    "the run needs)"
)


async def _wait(
    groups: Sequence[PlacementGroup],
    need: Sequence[Mapping[str, float]],
    deadline_s: float,
    say: Callable[[str], None],
) -> None:
    begun = said = time.monotonic()
    waiting = list(groups)
    while waiting:
        if await asyncio.to_thread(waiting[0].wait, _LOOK_EVERY_S):
            del waiting[0]
            continue
        now = time.monotonic()
        lack = missing(need, ray.cluster_resources(), _nodes()) or f"free are {_show(ray.available_resources())}"
        if now - begun > deadline_s:
            raise ClusterError(f"no placement within cluster.start_deadline_s={deadline_s:g} s: {lack}; {_REMEDY}")
        if now - said >= SAY_EVERY_S:
            say(f"waiting for resources ({now - begun:.0f} s): {lack}")
            said = now


def missing(
    need: Sequence[Mapping[str, float]], have: Mapping[str, float], nodes: Sequence[Mapping[str, float]]
) -> str:
    """Say in words what a cluster lacks; an empty text if all bundles may fit, once other work has ended.

    Args:
        need: resources of each bundle.
        have: resources of the whole cluster, used or not.
        nodes: resources of each node, used or not.
    """
    for name in ("CPU", "GPU"):
        total = sum(bundle.get(name, 0) for bundle in need)
        if total > have.get(name, 0) + _ROUNDING:
            return f"the run needs {total:g} {name}s and the cluster has {have.get(name, 0):g}"
    for bundle in need:
        if not any(all(node.get(name, 0) + _ROUNDING >= n for name, n in bundle.items()) for node in nodes):
            return f"an actor needs {_show(bundle)} on one node, and no node has that"
    return ""


def _is_own_cluster() -> bool:
    """Tell if this process has started the cluster, to which then no other node is added."""
    return bool(ray._private.worker._global_node.is_head())


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _show(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{v:g} {k}s" for k, v in sorted(resources.items()) if k in ("CPU", "GPU"))
