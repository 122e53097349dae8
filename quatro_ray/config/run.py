"""The sections that concern a run as a whole: run, evaluation, checkpoint, telemetry, cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from quatro_ray.config.base import Accepts, Section
from quatro_ray.config.paths import FunctionPath, OutputPath

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]


class RunConfig(Section):
    """The run itself, and what happens to an earlier one in its directory."""

    dir: OutputPath
    """Directory of everything that the run writes. Must be empty or absent, unless `overwrite` or `resume` is set."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of data order, sampling, and a tiny model's initial weights. Change it to repeat an experiment."""
    num_steps: int = Field(ge=1)
    """Optimiser steps of the whole run."""
    overwrite: bool = False
    """Replace what an earlier run left in `dir`."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the run in `dir` from where it ended, or start it if there is none yet."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the run in `dir` is to be both replaced and continued."""
        if self.overwrite and self.resume == "auto":
            yield "overwrite=true contradicts resume=auto: set only one of the two"


class EvaluationConfig(Section):
    """Evaluation of every set of data.eval at the start, at the end, and every `every_steps` steps."""

    every_steps: int | None = Field(None, ge=1)
    """Optimiser steps between evaluations. null: only at the start and at the end."""
    num_queries: int | None = Field(None, ge=1)
    """Evaluate only this many queries of each set, the first ones. null: all."""
    num_engines: int = Field(0, ge=0)
    """Engines for evaluation alone: each loads the exported weights of one version, and training continues meanwhile.
    0: the training generators evaluate, and the learner waits."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature of evaluation. null: as in training. 0: greedy, with one sample per query."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling of evaluation. null: as in training."""
    rollout_groups: int = Field(4, ge=0)
    """Queries of each set, the first ones, whose responses are written to evaluation_rollouts.jsonl."""
    samples_per_query: int = Field(16, ge=1)
    """n: samples per query, for the unbiased estimators of pass@k, avg@n and maj@n."""
    pass_at: tuple[int, ...] = Field((1, 8), min_length=1)
    """Values of k for which pass@k is reported; they include 1, and none exceeds samples_per_query."""
    deadline_s: float = Field(600, gt=0)
    """Seconds within which one set must be evaluated. Raise it for large sets or long responses."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each broken rule about the samples of a query and the k of pass@k."""
        if self.temperature == 0 and self.samples_per_query > 1:
            yield (
                f"temperature=0 (greedy) gives the same sample each time: set samples_per_query to 1 instead of "
                f"{self.samples_per_query}, and pass_at to [1]"
            )
        if 1 not in self.pass_at or not all(1 <= k <= self.samples_per_query for k in self.pass_at):
            yield (
                f"pass_at={list(self.pass_at)} must hold 1, and no k above samples_per_query={self.samples_per_query}: "
                "draw more samples or drop the largest k"
            )


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes and the learner restarts."""

    every_steps: int | None = Field(None, ge=1)
    """Optimiser steps between checkpoints. null: only at the end and when the run is told to end."""
    dir: OutputPath | None = None
    """Directory of the checkpoints, which no two runs may share. null: checkpoints/ in run.dir."""
    keep: int = Field(2, ge=1)
    """Complete checkpoints to keep; the oldest is deleted only after a new one is on disk."""
    deadline_s: float = Field(600, gt=0)
    """Seconds within which one checkpoint must be written. Raise it for large models or slow disks."""
    grace_s: float = Field(25, gt=0)
    """Seconds after SIGINT, SIGTERM or SIGHUP within which the current step and a checkpoint must end; then the run
    ends in any case. Keep it below the scheduler's own grace period."""


class TelemetryConfig(Section):
    """Records of the run, besides metrics.jsonl and the report."""

    removed: ClassVar = {
        "tensorboard": "list it in telemetry.trackers instead, or set that to [] for none (docs/trackers.md)"
    }

    trackers: Annotated[tuple[TrackerName, ...], Accepts("a list of tensorboard, wandb, mlflow, trackio, swanlab")] = (
        "tensorboard",
    )
    """Experiment trackers that get the metrics, each through its own client (docs/trackers.md). Accounts, servers and
    offline modes are set by the client's own environment variables, never here."""
    project: str = Field("quatro_ray", min_length=1)
    """Project of the run in trackers that have projects; MLflow calls it an experiment."""
    run_name: str | None = Field(None, min_length=1)
    """Name of the run in trackers. null: the name of run.dir."""
    callbacks: Annotated[tuple[FunctionPath, ...], Accepts("a list of module:name or path/to/file.py:name")] = ()
    """Your own trackers: classes or functions that are called with metrics, evaluations and checkpoints."""
    tracker_deadline_s: float = Field(60, gt=0)
    """Seconds within which a tracker or callback must handle one record, and all of them together must end when the run
    ends. Training never waits for them meanwhile."""
    prometheus: bool = True
    """Add metrics to those that Ray's agent on each node offers to Prometheus anyway (docs/monitoring.md)."""
    rollout_groups_per_step: int = Field(1, ge=0)
    """Groups of each step that are written to rollouts.jsonl in readable form."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each tracker or callback that is listed twice."""
        for field, names in (("trackers", self.trackers), ("callbacks", self.callbacks)):
            for name in sorted({n for n in names if names.count(n) > 1}):
                yield f"{field}={list(names)} has {name} twice: remove one"


class ClusterConfig(Section):
    """Devices and resources of the actors, and deadlines of the cluster."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Device of engines and learner ranks."""
    colocate: bool = False
    """Let each engine share its GPU with a learner rank, so that one GPU is enough. Needs as many engines as ranks, and
    generator.kv_cache_gib. `quatro-ray plan` shows how they divide the memory."""
    colocate_mode: Literal["overlapping", "alternating"] = "overlapping"
    """overlapping: engine and rank work at the same time, each in its part of the GPU's memory. alternating: the engine
    frees its memory while the learner trains a batch, and keeps its running requests; for models that fit only so."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of a GPU in GiB, as nvidia-smi shows it (22 for cards sold as 24 GB). With it `quatro-ray plan` checks
    that what is planned for a GPU fits. Needed for colocate=true on GPUs."""
    address: str | None = None
    """Ray cluster to join. null: the one in RAY_ADDRESS (set in a submitted job), else a local one."""
    cpus_per_engine: float = Field(1, ge=0)
    """CPU cores that Ray reserves for each engine."""
    cpus_per_rank: float = Field(1, ge=0)
    """CPU cores that Ray reserves for each learner rank."""
    cpus_per_verifier: float = Field(1, ge=0)
    """CPU cores that Ray reserves for each worker process of a verifier actor."""
    cpus_per_environment: float = Field(1, ge=0)
    """CPU cores that Ray reserves for each environment actor, whose processes mostly wait for the engines."""
    threads_per_process: int = Field(1, ge=1)
    """OMP_NUM_THREADS of engines and learner ranks, and of the warm-up of a tiny model."""
    start_deadline_s: float = Field(300, gt=0)
    """Seconds within which Ray must place all actors."""
    stall_deadline_s: float = Field(900, gt=0)
    """Seconds without an optimiser step after which the run ends with a report of what waits for what."""
    liveness_deadline_s: float = Field(60, gt=0)
    """Seconds without a heartbeat after which an engine or learner rank is killed and restarted."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each setting that colocate=true lacks or needs."""
        if self.colocate_mode == "alternating" and not self.colocate:
            yield "colocate_mode=alternating needs colocate=true: set both, or neither"
        if self.colocate and self.device == "cuda" and self.gpu_memory_gib is None:
            yield "colocate=true needs gpu_memory_gib, the memory that engine and rank share: set it"
