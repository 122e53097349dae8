"""Spawns, starts and ends all actors of a run."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.device_turns import DeviceTurns
from quatro_ray.actors.environment import EnvironmentActor
from quatro_ray.actors.environment_pool import EnvironmentPool
from quatro_ray.actors.fleet import EngineSlot, Fleet
from quatro_ray.actors.generator import GeneratorActor
from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.actors.learner import LearnerActor
from quatro_ray.actors.learner_group import LearnerGroup
from quatro_ray.actors.node import draining_nodes, own_node_lives
from quatro_ray.actors.replay import ReplayActor
from quatro_ray.actors.replay_client import ReplayClient
from quatro_ray.actors.reward_model import RewardModelActor
from quatro_ray.actors.verifier import VerifierActor
from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.config import Config, EnvironmentConfig, ModelRewardConfig
from quatro_ray.engines.checkpoint_store import checkpoint_store
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.environments.registry import environment_of
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.evaluation.evaluator import Evaluator
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.device_memory import device_memory, shares_gpu
from quatro_ray.orchestrator.engine_places import EnginePlaces
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import evaluation_bundles
from quatro_ray.orchestrator.startup import start_together
from quatro_ray.rewards.registry import executing_rewards
from quatro_ray.timeouts import within
from quatro_ray.weight_sync.agreement import AgreementCheck
from quatro_ray.weight_sync.coordinator import WeightSyncCoordinator

_SHUTDOWN_S = 30.0
_SHUTDOWN_IN_START_S = 3.0
"""An actor that still imports its libraries does not answer; Kubernetes gives a pod 30 s in all."""
_STARTS_WAITED_FOR = 3
"""If no engine is left, a weight update waits as long as this many starts, because an engine may hang in its start."""


@dataclass(frozen=True)
class ScoringActors:
    """The actors that score and play, which training and evaluation both need.

    Attributes:
        reward_models: the engines of each reward model, by the reward's name in the configuration.
        environments: one pool per environment, by its name in the configuration.
    """

    verifiers: VerifierPool
    reward_models: dict[str, list[ActorHandle]]
    environments: dict[str, EnvironmentPool]

    @classmethod
    def spawn(cls, place: Placer, model_path: str) -> ScoringActors:
        """Create the actors, which are not started yet."""
        reward_models = _reward_models(place)
        verifiers = _verifiers(place, reward_models)
        return cls(verifiers, reward_models, _environments(place, model_path))

    def by_source(self, config: Config) -> dict[str, EnvironmentPool]:
        """Return the environment of each data source that has one."""
        return {source: self.environments[name] for source, name in environment_of(config).items()}

    async def start(self, config: Config) -> None:
        """Start all actors.

        Raises:
            ClusterError: an actor failed, or did not start before its deadline.
        """
        for name, actors in self.reward_models.items():
            reward = config.rewards[name]
            assert isinstance(reward, ModelRewardConfig)
            await _started(actors, reward.start_deadline_s, f"reward model {name}")
        await _started(self.verifiers.actors, config.verifier.start_deadline_s, "verifier")
        for name, pool in self.environments.items():
            await _started(pool.actors, config.environments[name].start_deadline_s, f"environment {name}")

    def by_role(self) -> dict[str, list[ActorHandle]]:
        """Return the actors of each role."""
        return {
            **{f"reward model {name}": actors for name, actors in self.reward_models.items()},
            **{f"environment {name}": pool.actors for name, pool in self.environments.items()},
            "verifier": self.verifiers.actors,
        }

    def all(self) -> list[ActorHandle]:
        """Return all actors."""
        return [actor for actors in self.by_role().values() for actor in actors]


@dataclass(frozen=True)
class Cluster:
    """All actors of a training run."""

    place: Placer
    places: EnginePlaces
    fleet: Fleet
    turns: DeviceTurns | None
    learner: LearnerGroup
    replay: ActorHandle
    scoring: ScoringActors
    evaluator: Evaluator | None

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.place.config

    def components(self) -> Components:
        """Return what the controller drives."""
        config = self.config
        return Components(
            generators=self.fleet,
            verifiers=self.scoring.verifiers,
            replay=ReplayClient(self.replay, config.replay.deadline_s),
            learner=self.learner,
            weight_sync=WeightSyncCoordinator(
                self.fleet,
                self.learner,
                config.weight_sync,
                _STARTS_WAITED_FOR * config.generator.start_deadline_s,
                generates_during_transfer=config.sync_backend == "gloo" or config.engine_adapter is not None,
                agreement=_agreement(config, self.learner),
            ),
            checkpoints=checkpoint_store(config),
            evaluator=self.evaluator,
            drain_notice=lambda: draining_nodes(self.generators()),
            learner_turn=nullcontext if self.turns is None else self.turns.of_learner,
        )

    def generators(self) -> list[ActorHandle]:
        """Return the actors of the engines."""
        return [_client_of(slot).actor for slot in self.fleet.slots]

    def peak_rss_bytes(self) -> dict[str, int]:
        """Return the peak memory of each role, without actors that are being replaced."""
        roles = {
            **self.scoring.by_role(),
            "generator": self.generators(),
            "learner": self.learner.actors,
            "replay": [self.replay],
        }
        return {role: sum(_peak_rss_bytes(actor) for actor in actors) for role, actors in roles.items()}

    def shutdown(self, grace_s: float = _SHUTDOWN_S) -> None:
        """End the engines in order within `grace_s` seconds, then everything else; safe after a failure."""
        _end([*self.generators(), *self.scoring.all()], grace_s, killed=[*self.learner.actors, self.replay])
        self.places.release()
        self.place.release()


async def spawn(place: Placer, model_path: str, say: Callable[[str], None]) -> Cluster:
    """Start all actors side by side.

    Args:
        place: has reserved the resources of the run; each kind of actor has its own `start_deadline_s` in its
            configuration.
        model_path: folder or name of the starting policy.
        say: shows what the start waits for.

    Raises:
        ClusterError: an actor did not start before its deadline.
    """
    config = place.config
    replay = place(ReplayActor, "replay", 0, max_restarts=-1, max_task_retries=-1).remote(
        config.replay, config.run.dir / "ledger.sqlite", num_steps=config.run.num_steps
    )
    learner = make_learner(place, model_path)
    scoring = ScoringActors.spawn(place, model_path)
    environments = scoring.by_source(config)
    places = EnginePlaces(place)
    device_lock = asyncio.Lock() if config.alternates else None
    fleet = Fleet(
        lambda index: GeneratorClient(_engine(place, "generator", model_path, index), environments),
        config.generator,
        config.cluster.liveness_deadline_s,
        room=places.room,
        give_back=places.give_back,
        device_lock=device_lock,
    )
    turns = DeviceTurns(fleet, device_lock, config.generator.sleep_deadline_s) if device_lock else None
    evaluator = _evaluator(place, scoring) if config.evaluation.num_engines else None
    cluster = Cluster(place, places, fleet, turns, learner, replay, scoring, evaluator)
    try:
        await _start(cluster, say)
    except BaseException:
        cluster.shutdown(_SHUTDOWN_IN_START_S)
        raise
    return cluster


def make_learner(place: Placer, model_path: str) -> LearnerGroup:
    """Create the actors of all ranks, which are not started yet."""
    config = place.config
    return LearnerGroup(
        partial(_ranks, place, model_path),
        config.learner,
        config.weight_sync,
        "adapter" if config.engine_adapter else config.sync_backend,
        config.generator.devices_per_engine,
    )


@dataclass(frozen=True)
class EvaluationCluster:
    """All actors of `quatro-ray eval`, besides the engines, which the evaluator starts itself."""

    place: Placer
    evaluator: Evaluator
    scoring: ScoringActors

    def shutdown(self, grace_s: float = _SHUTDOWN_S) -> None:
        """End all actors in order within `grace_s` seconds."""
        _end(self.scoring.all(), grace_s)
        self.place.release()


async def spawn_evaluation(config: Config, model_path: str, say: Callable[[str], None]) -> EvaluationCluster:
    """Place and start verifiers, reward models and environments.

    Args:
        config: the whole configuration; room is reserved for `evaluation.num_engines` engines, at least one.
        model_path: folder or name of the model whose tokenizer the environments use.
        say: shows what the start waits for.

    Raises:
        ClusterError: the cluster is too small, or an actor did not start before its deadline.
    """
    place = await Placer.reserve(config, evaluation_bundles(config), say)
    scoring = ScoringActors.spawn(place, model_path)
    cluster = EvaluationCluster(place, _evaluator(place, scoring), scoring)
    try:
        await start_together({"verifiers": scoring.start(config)}, say)
    except BaseException:
        cluster.shutdown(_SHUTDOWN_IN_START_S)
        raise
    return cluster


def _agreement(config: Config, learner: LearnerGroup) -> AgreementCheck:
    is_exact = config.generator.dtype == config.learner.dtype == "float32"
    return AgreementCheck(
        learner=learner,
        max_tokens=config.generator.max_prompt_tokens + config.generator.max_response_tokens - 1,
        max_nats=config.weight_sync.max_logprob_abs_diff or (0.01 if is_exact else 0.3),
        every_updates=config.weight_sync.check_every_updates,
        deadline_s=config.weight_sync.check_deadline_s,
    )


def _evaluator(place: Placer, scoring: ScoringActors) -> Evaluator:
    engine = partial(_engine, place, "evaluator")
    return Evaluator(place.config, scoring.verifiers, engine, scoring.by_source(place.config))


def _client_of(slot: EngineSlot) -> GeneratorClient:
    assert isinstance(slot.client, GeneratorClient)
    return slot.client


def _end(actors: Sequence[ActorHandle], grace_s: float, killed: Sequence[ActorHandle] = ()) -> None:
    """Let `actors` end their own processes within `grace_s` seconds before they are killed; then kill `killed` too."""
    if own_node_lives():
        ending = [actor.shutdown.remote() for actor in actors]
        ray.wait(ending, num_returns=len(ending), timeout=grace_s)
    for actor in [*actors, *killed]:
        ray.kill(actor)


async def _start(cluster: Cluster, say: Callable[[str], None]) -> None:
    config = cluster.config
    engines = {"engines": _started(cluster.generators(), config.generator.start_deadline_s, "generator")}
    try:
        if config.cluster.colocate:  # an engine refuses to start if its part of the device's memory is not free
            await start_together(engines, say)
            engines = {}
        learner, verifiers = cluster.learner.start(), cluster.scoring.start(config)
        await start_together({"learner": learner, "verifiers": verifiers, **engines}, say)
    except LearnerLost as error:
        raise ClusterError(f"{error}; see the logs under {_log_dir()}") from error


def _ranks(place: Placer, model_path: str) -> list[ActorHandle]:
    config = place.config
    spec = LearnerSpec(
        model_path=model_path,
        config=config.learner,
        objective=config.objective,
        device=config.cluster.device,
        temperature=config.generator.temperature,
        max_response_tokens=config.generator.max_response_tokens,
        seed=config.run.seed,
        num_steps=config.run.num_steps,
        device_share=device_memory(config).rank_share if shares_gpu(config) else 1.0,
        frees_memory=config.alternates,
    )
    return [place(LearnerActor, "learner", i).remote(spec, rank=i) for i in range(config.learner.num_ranks)]


def _engine(place: Placer, role: str, model_path: str, index: int) -> ActorHandle:
    config = place.config
    generator = config.generator
    if role == "generator" and shares_gpu(config):
        generator = generator.model_copy(update={"gpu_memory_utilization": device_memory(config).engine_share})
    return place(GeneratorActor, role, index, max_concurrency=1000).remote(
        model_path,
        generator,
        device=config.cluster.device,
        sync_backend=config.sync_backend,
        seed=config.run.seed,
        sleeps=role == "generator" and config.alternates,
        adapter=config.engine_adapter if role == "generator" else None,  # evaluators load merged exports
    )


def _reward_models(place: Placer) -> dict[str, list[ActorHandle]]:
    config = place.config
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


def _verifiers(place: Placer, reward_models: dict[str, list[ActorHandle]]) -> VerifierPool:
    config = place.config
    sandboxed = executing_rewards(config.rewards, [*config.data.train.values(), *config.data.eval.values()])
    spawned = itertools.count()

    def one() -> ActorHandle:
        index = next(spawned) % config.verifier.num_actors
        actor = place(VerifierActor, "verifier", index, max_concurrency=1000)
        return actor.remote(config.rewards, config.verifier, reward_models, sandboxed)

    return VerifierPool(one, config.verifier)


def _environments(place: Placer, model_path: str) -> dict[str, EnvironmentPool]:
    def pool(name: str, environment: EnvironmentConfig) -> EnvironmentPool:
        spawned = itertools.count()

        def one() -> ActorHandle:
            index = next(spawned) % environment.num_actors
            actor = place(EnvironmentActor, f"environment {name}", index, max_concurrency=1000)
            return actor.remote(environment, model_path)

        return EnvironmentPool(one, environment)

    return {name: pool(name, environment) for name, environment in place.config.environments.items()}


def _peak_rss_bytes(actor: ActorHandle) -> int:
    """Return 0 if the actor does not answer: a missing figure must not fail a run in its last second."""
    try:
        return int(ray.get(actor.peak_rss_bytes.remote(), timeout=10))
    except (GetTimeoutError, RayError):
        return 0


async def _started(actors: Sequence[ActorHandle], deadline_s: float, what: str) -> None:
    """Call `start` on all actors; raise ClusterError if one fails or misses the deadline."""
    try:
        await within(deadline_s, asyncio.gather(*(value_of(actor.start.remote()) for actor in actors)))
    except TimeoutError as error:
        raise ClusterError(f"{what} did not start within {deadline_s:g} s; see the logs under {_log_dir()}") from error
    except RayError as error:
        raise ClusterError(f"{what} failed: {last_line(error)}; see the logs under {_log_dir()}") from error


def _log_dir() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())
