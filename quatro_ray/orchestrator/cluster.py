"""Placement, spawning and ending of all actors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import remove_placement_group

from quatro_ray.actors.environment import EnvironmentActor
from quatro_ray.actors.environment_pool import EnvironmentPool
from quatro_ray.actors.fleet import Fleet
from quatro_ray.actors.generator import GeneratorActor
from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.actors.learner import LearnerActor
from quatro_ray.actors.learner_group import LearnerGroup
from quatro_ray.actors.node import own_node_lives
from quatro_ray.actors.replay import ReplayActor
from quatro_ray.actors.replay_client import ReplayClient
from quatro_ray.actors.reward_model import RewardModelActor
from quatro_ray.actors.verifier import VerifierActor
from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.config import Config, EnvironmentConfig, ModelRewardConfig
from quatro_ray.engines.checkpoint_store import checkpoint_store
from quatro_ray.environments.registry import environment_of
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.evaluation.evaluator import Evaluator
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.controller import Components
from quatro_ray.orchestrator.placement import Placer, reserve
from quatro_ray.orchestrator.resources import bundles, evaluation_bundles
from quatro_ray.rewards.registry import executing_parts
from quatro_ray.weight_sync.coordinator import WeightSyncCoordinator

_SHUTDOWN_S = 30.0


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

    def parts(self) -> Components:
        """What the controller drives."""
        config = self.config
        return Components(
            generators=self.fleet,
            verifiers=self.verifiers,
            replay=ReplayClient(self.replay, config.replay.deadline_s),
            learner=self.learner,
            weight_sync=WeightSyncCoordinator(
                self.fleet, self.learner, config.weight_sync, config.generator.start_deadline_s
            ),
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
    placement = reserve(config, plan)
    place = Placer(config, plan, placement)
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
    placement = reserve(config, plan)
    place = Placer(config, plan, placement)
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


def _ranks(place: Placer, model_path: str) -> list[Any]:
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


def _engine(place: Placer, role: str, model_path: str, index: int) -> Any:
    config = place.config
    return place(GeneratorActor, role, index, max_concurrency=1000).remote(
        model_path,
        config.generator,
        device=config.cluster.device,
        sync_backend=config.sync_backend,
        seed=config.run.seed,
    )


def _reward_models(config: Config, place: Placer) -> dict[str, list[Any]]:
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


def _verifiers(config: Config, place: Placer, reward_models: dict[str, list[Any]]) -> VerifierPool:
    sandboxed = executing_parts(config.rewards, [*config.data.train.values(), *config.data.eval.values()])
    spawned = itertools.count()

    def one() -> Any:
        index = next(spawned) % config.verifier.num_actors
        actor = place(VerifierActor, "verifier", index, max_concurrency=1000)
        return actor.remote(config.rewards, config.verifier, reward_models, sandboxed)

    return VerifierPool(one, config.verifier)


def _environments(config: Config, place: Placer, model_path: str) -> dict[str, EnvironmentPool]:
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


def _peak_rss_bytes(actor: Any) -> int:
    """0 where it does not answer: a figure for people is no reason for a run to fail in its last second."""
    try:
        return int(ray.get(actor.peak_rss_bytes.remote(), timeout=10))
    except (GetTimeoutError, RayError):
        return 0


def _get(refs: list[Any], deadline_s: float, what: str) -> list[Any]:
    try:
        return ray.get(refs, timeout=deadline_s)
    except GetTimeoutError as error:
        raise ClusterError(f"{what} did not answer within {deadline_s:g} s") from error
    except RayError as error:
        raise ClusterError(f"{what} failed: {last_line(error)}; see the logs under {_log_dir()}") from error


def _log_dir() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())
