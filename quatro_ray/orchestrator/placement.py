"""Reserves the resources of a run, and puts each actor into its bundle."""

from __future__ import annotations

from collections.abc import Sequence

import ray
from ray.actor import ActorClass
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quatro_ray.config import Config
from quatro_ray.errors import ClusterError
from quatro_ray.orchestrator.resources import Bundle


class Placer:
    """Puts an actor of a role into its bundle, with the environment variables of that role."""

    def __init__(self, config: Config, plan: Sequence[Bundle], placement: PlacementGroup) -> None:
        self.config = config
        self.placement = placement
        self._plan = plan

    @classmethod
    def reserve(cls, config: Config, plan: Sequence[Bundle]) -> Placer:
        """Reserve the resources of the plan.

        Args:
            config: the whole configuration; `cluster.start_deadline_s` bounds the wait for free resources.
            plan: one bundle per actor.

        Raises:
            ClusterError: the cluster is too small, or the resources do not become free within the deadline.
        """
        _check_fits(plan)
        placement = placement_group([b.resources for b in plan], strategy="PACK")
        if not placement.wait(config.cluster.start_deadline_s):
            remove_placement_group(placement)
            raise ClusterError(
                f"no placement within cluster.start_deadline_s={config.cluster.start_deadline_s:g} s; free resources: "
                f"{_show(ray.available_resources())}; `quatro-ray plan` shows what the run needs"
            )
        return cls(config, plan, placement)

    def __call__(self, actor_class: ActorClass, role: str, index: int, **options: object) -> ActorClass:
        """Return the class with the options of its bundle; call `remote` on it to start the actor."""
        position = next(i for i, b in enumerate(self._plan) if (b.role, b.index) == (role, index))
        resources = self._plan[position].resources
        return actor_class.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, position),
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
        elif role == "learner":
            # rows of changing widths would leave holes in the GPU's memory that nothing fits into
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return env


def _check_fits(plan: Sequence[Bundle]) -> None:
    have = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        need = sum(b.resources.get(name, 0) for b in plan)
        if need > have.get(name, 0) + 1e-6:
            raise ClusterError(
                f"the run needs {need:g} {name}s and the cluster has {have.get(name, 0):g}: lower cluster.cpus_per_*, "
                "the number of engines, ranks or verifiers, or add nodes (`quatro-ray plan` shows the sum)"
            )


def _show(resources: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in sorted(resources.items()) if k in ("CPU", "GPU"))
