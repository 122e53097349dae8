"""Placement, spawning and ending of all actors."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quatro_ray.actors.clients import GeneratorClient, ReplayClient
from quatro_ray.actors.environment import EnvironmentActor
from quatro_ray.actors.environment_pool import EnvironmentPool
from quatro_ray.actors.fleet import Fleet
from quatro_ray.actors.generator import GeneratorActor
from quatro_ray.actors.learner import LearnerActor
from quatro_ray.actors.learner_group import LearnerGroup
from quatro_ray.actors.node import own_node_lives
from quatro_ray.actors.replay import ReplayActor
from quatro_ray.actors.reward_model import RewardModelActor
from quatro_ray.actors.verifier import VerifierActor
from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.checkpoints import checkpoint_store
from quatro_ray.config import Config, EnvironmentConfig, ModelRewardConfig
from quatro_ray.controller import Parts
from quatro_ray.environments.registry import environment_of
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.evaluator import Evaluator
from quatro_ray.plan import Bundle, bundles, evaluation_bundles
from quatro_ray.rewards.registry import executing_parts
from quatro_ray.weight_sync.update import LearnerLost, WeightSync

_LISTENS_FOR_OTHERS = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Unless it is 1, a cluster of one machine listens on loopback alone."""
_SHUTDOWN_S = 30.0
_KNOCK_S = 10.0


def connect(config: Config) -> None:
    """Joins the cluster of `cluster.address` or RAY_ADDRESS, else starts one on this machine alone.

    Raises:
        ClusterError: there is none at the address.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    common = {"log_to_driver": False, "logging_level": "WARNING"}
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
        ray_constants.ENABLE_RAY_CLUSTER = False  # of the variable, which Ray's processes read, it took note on import
    ray.init(address="local", include_dashboard=False, **common)


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at host:port: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_S).close()


@dataclass
class Cluster:
    """All actors of a run."""

    config: Config
    placement: Any
    fleet: Fleet
    learner: LearnerGroup
    replay: Any
    verifiers: VerifierPool
    reward_models: dict[str, list[Any]]
    """By the name of their part of the reward."""
    environments: dict[str, EnvironmentPool]
    """By the name of the environment."""
    evaluator: Evaluator | None

    def parts(self) -> Parts:
        """What the controller drives."""
        config = self.config
        return Parts(
            generators=self.fleet,
            verifiers=self.verifiers,
            replay=ReplayClient(self.replay, config.replay.deadline_s),
            learner=self.learner,
            weight_sync=WeightSync(self.fleet, self.learner, config.weight_sync, config.generator.start_deadline_s),
            checkpoints=checkpoint_store(config),
            evaluator=self.evaluator,
        )

    def generators(self) -> list[Any]:
        return [member.client.actor for member in self.fleet.members]

    def peak_rss_bytes(self) -> dict[str, int]:
        """Summed over the actors of a role, those that are being replaced just now left out."""
        roles = {
            **{f"reward model {name}": actors for name, actors in self.reward_models.items()},
            **{f"environment {name}": pool.actors for name, pool in self.environments.items()},
            "generator": self.generators(),
            "learner": self.learner.actors,
            "replay": [self.replay],
            "verifier": self.verifiers.actors,
        }
        return {role: sum(_peak_rss_bytes(actor) for actor in actors) for role, actors in roles.items()}

    def shutdown(self) -> None:
        """Ends the engines in order, then everything else; safe after a failure."""
        judges = _judges(self.verifiers, self.reward_models, self.environments)
        _end([*self.generators(), *judges], killed=[*self.learner.actors, self.replay])
        remove_placement_group(self.placement)


def spawn(config: Config, model_path: str) -> Cluster:
    """Places and starts all actors, engines and learner ranks side by side.

    Raises:
        ClusterError: the cluster is too small, or something did not start before its deadline.
    """
    plan = bundles(config)
    placement = _place(config, plan)
    place = _Placer(config, plan, placement)
    replay = place(ReplayActor, "replay", 0, max_restarts=-1, max_task_retries=-1).remote(
        config.replay, config.run.dir / "ledger.sqlite", num_steps=config.run.num_steps
    )
    learner = LearnerGroup(
        partial(_ranks, place, model_path),
        config.learner,
        config.weight_sync,
        config.sync_backend,
        config.generator.tensor_parallel_size,
    )
    reward_models = _reward_models(config, place)
    verifiers = _verifiers(config, place, reward_models)
    environments = _environments(config, place, model_path)
    evaluator = Evaluator(config, verifiers, partial(_engine, place, "evaluator"), _by_source(config, environments))
    by_source = _by_source(config, environments)
    fleet = Fleet(
        lambda index: GeneratorClient(_engine(place, "generator", model_path, index), by_source),
        config.generator,
        config.cluster.liveness_deadline_s,
    )
    cluster = Cluster(
        config,
        placement,
        fleet,
        learner,
        replay,
        verifiers,
        reward_models,
        environments,
        evaluator if config.evaluation.num_engines else None,
    )
    try:
        _start(cluster)
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


@dataclass
class EvaluationCluster:
    """What `quatro-ray eval` needs; the evaluator starts its engines itself."""

    placement: Any
    evaluator: Evaluator
    verifiers: VerifierPool
    reward_models: dict[str, list[Any]]
    environments: dict[str, EnvironmentPool]

    def shutdown(self) -> None:
        _end(_judges(self.verifiers, self.reward_models, self.environments))
        remove_placement_group(self.placement)


def spawn_evaluation(config: Config, model_path: str) -> EvaluationCluster:
    """Places and starts verifiers, reward models and environments. Raises ClusterError like `spawn`."""
    plan = evaluation_bundles(config)
    placement = _place(config, plan)
    place = _Placer(config, plan, placement)
    reward_models = _reward_models(config, place)
    verifiers = _verifiers(config, place, reward_models)
    environments = _environments(config, place, model_path)
    evaluator = Evaluator(config, verifiers, partial(_engine, place, "evaluator"), _by_source(config, environments))
    cluster = EvaluationCluster(placement, evaluator, verifiers, reward_models, environments)
    try:
        _start_judges(config, verifiers, reward_models, environments)
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


def _place(config: Config, plan: Sequence[Bundle]) -> Any:
    _check_fits(plan)
    placement = placement_group([b.resources for b in plan], strategy="PACK")
    if not placement.wait(config.cluster.start_deadline_s):
        remove_placement_group(placement)
        raise ClusterError(
            f"no placement within cluster.start_deadline_s={config.cluster.start_deadline_s:g} s; "
            f"free resources: {_show(ray.available_resources())}; `quatro-ray plan` shows what is asked for"
        )
    return placement


def _start_judges(
    config: Config,
    verifiers: VerifierPool,
    reward_models: dict[str, list[Any]],
    environments: dict[str, EnvironmentPool],
) -> None:
    for name, actors in reward_models.items():
        part = config.rewards[name]
        assert isinstance(part, ModelRewardConfig)
        _get([a.start.remote() for a in actors], part.start_deadline_s, f"reward model {name}")
    _get([a.start.remote() for a in verifiers.actors], config.verifier.start_deadline_s, "verifier")
    for name, pool in environments.items():
        deadline = config.environments[name].start_deadline_s
        _get([a.start.remote() for a in pool.actors], deadline, f"environment {name}")


def _judges(
    verifiers: VerifierPool, reward_models: dict[str, list[Any]], environments: dict[str, EnvironmentPool]
) -> list[Any]:
    pools = [verifiers, *environments.values()]
    return [a for actors in (*(p.actors for p in pools), *reward_models.values()) for a in actors]


def _end(actors: Sequence[Any], killed: Sequence[Any] = ()) -> None:
    """Those that have processes of their own end them first; whoever does not is killed like the others."""
    if own_node_lives():
        ending = [actor.shutdown.remote() for actor in actors]
        ray.wait(ending, num_returns=len(ending), timeout=_SHUTDOWN_S)
    for actor in [*actors, *killed]:
        ray.kill(actor)


def _start(cluster: Cluster) -> None:
    config = cluster.config
    engines = [actor.start.remote() for actor in cluster.generators()]
    try:
        asyncio.run(cluster.learner.start())
    except LearnerLost as error:
        raise ClusterError(f"{error}; see the logs under {_log_dir()}") from error
    _start_judges(config, cluster.verifiers, cluster.reward_models, cluster.environments)
    _get(engines, config.generator.start_deadline_s, "generator")


def _ranks(place: _Placer, model_path: str) -> list[Any]:
    config = place.config
    return [
        place(LearnerActor, "learner", i).remote(
            model_path,
            config.learner,
            config.objective,
            rank=i,
            device=config.cluster.device,
            temperature=config.generator.temperature,
            max_response_tokens=config.generator.max_response_tokens,
            seed=config.run.seed,
            num_steps=config.run.num_steps,
        )
        for i in range(config.learner.num_ranks)
    ]


def _engine(place: _Placer, role: str, model_path: str, index: int) -> Any:
    config = place.config
    return place(GeneratorActor, role, index, max_concurrency=1000).remote(
        model_path,
        config.generator,
        device=config.cluster.device,
        sync_backend=config.sync_backend,
        seed=config.run.seed,
    )


def _reward_models(config: Config, place: _Placer) -> dict[str, list[Any]]:
    return {
        name: [
            place(RewardModelActor, f"reward model {name}", i, max_concurrency=1000).remote(
                part, device=config.cluster.device
            )
            for i in range(part.num_engines)
        ]
        for name, part in config.rewards.items()
        if isinstance(part, ModelRewardConfig)
    }


def _verifiers(config: Config, place: _Placer, reward_models: dict[str, list[Any]]) -> VerifierPool:
    sandboxed = executing_parts(config.rewards, [*config.data.train.values(), *config.data.eval.values()])
    spawned = itertools.count()

    def one() -> Any:
        index = next(spawned) % config.verifier.num_actors
        actor = place(VerifierActor, "verifier", index, max_concurrency=1000)
        return actor.remote(config.rewards, config.verifier, reward_models, sandboxed)

    return VerifierPool(one, config.verifier)


def _environments(config: Config, place: _Placer, model_path: str) -> dict[str, EnvironmentPool]:
    def pool(name: str, environment: EnvironmentConfig) -> EnvironmentPool:
        spawned = itertools.count()

        def one() -> Any:
            index = next(spawned) % environment.num_actors
            actor = place(EnvironmentActor, f"environment {name}", index, max_concurrency=1000)
            return actor.remote(environment, model_path)

        return EnvironmentPool(one, environment)

    return {name: pool(name, environment) for name, environment in config.environments.items()}


def _by_source(config: Config, environments: Mapping[str, EnvironmentPool]) -> dict[str, EnvironmentPool]:
    return {source: environments[name] for source, name in environment_of(config).items()}


class _Placer:
    """Puts an actor of a role into its bundle, with the environment of that role."""

    def __init__(self, config: Config, plan: Sequence[Bundle], placement: Any) -> None:
        self.config = config
        self._plan = plan
        self._placement = placement

    def __call__(self, actor_class: Any, role: str, index: int, **options: Any) -> Any:
        position = next(i for i, b in enumerate(self._plan) if (b.role, b.index) == (role, index))
        resources = self._plan[position].resources
        return actor_class.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, position),
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
        return env


def _peak_rss_bytes(actor: Any) -> int:
    """0 where it does not answer: a figure for people is no reason for a run to fail in its last second."""
    try:
        return int(ray.get(actor.peak_rss_bytes.remote(), timeout=10))
    except (GetTimeoutError, RayError):
        return 0


def _check_fits(plan: Sequence[Bundle]) -> None:
    have = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        need = sum(b.resources.get(name, 0) for b in plan)
        if need > have.get(name, 0) + 1e-6:
            raise ClusterError(
                f"the run needs {need:g} {name}s and the cluster has {have.get(name, 0):g}: lower cluster.cpus_per_*, "
                "the number of engines, ranks or verifiers, or add nodes (`quatro-ray plan` shows the sum)"
            )


def _get(refs: list[Any], deadline_s: float, what: str) -> list[Any]:
    try:
        return ray.get(refs, timeout=deadline_s)
    except GetTimeoutError as error:
        raise ClusterError(f"{what} did not answer within {deadline_s:g} s") from error
    except RayError as error:
        raise ClusterError(f"{what} failed: {last_line(error)}; see the logs under {_log_dir()}") from error


def _log_dir() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _show(resources: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in sorted(resources.items()) if k in ("CPU", "GPU"))
