"""The components that the controller drives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from quatro_ray.actors.fleet import EngineSlot, Fleet
from quatro_ray.actors.interfaces import Learner, Replay, Verifiers
from quatro_ray.engines.checkpoint_store import CheckpointStore
from quatro_ray.orchestrator.background_evaluation import DedicatedEvaluator
from quatro_ray.orchestrator.drain_monitor import DrainNotice
from quatro_ray.weight_sync.coordinator import WeightSyncCoordinator


@dataclass(frozen=True)
class Components:
    """All components of a run; actors/interfaces.py describes the protocols.

    Attributes:
        evaluator: evaluates on dedicated engines. If None, evaluation runs on the training generators.
        drain_notice: tells which nodes are going away. If None, nobody tells.
        learner_turn: entered while a batch is trained. By default the learner has its devices for itself.
    """

    generators: Fleet
    verifiers: Verifiers
    replay: Replay
    learner: Learner
    weight_sync: WeightSyncCoordinator[EngineSlot]
    checkpoints: CheckpointStore
    evaluator: DedicatedEvaluator | None = None
    drain_notice: DrainNotice | None = None
    learner_turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
