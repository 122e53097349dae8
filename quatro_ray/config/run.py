"""A run as a whole: where it writes, how it is evaluated, kept and watched, and where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quatro_ray.config.base import AbsolutePath, Section


class RunConfig(Section):
    dir: AbsolutePath
    """Where everything is written. Must be empty or absent, unless `overwrite`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds data order, sampling, initial weights of a tiny model."""
    num_steps: int = Field(ge=1)
    """Optimiser steps."""
    overwrite: bool = False
    """Replace what an earlier run left in `dir`."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on where the run in `dir` ended, however that was, and start it where there is none yet."""

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> RunConfig:
        if self.overwrite and self.resume == "auto":
            raise ValueError("overwrite=true and resume=auto contradict each other: set one of the two")
        return self


class EvaluationConfig(Section):
    """Every set of data.eval, at the start, the end, and every so many steps."""

    every_steps: int | None = Field(None, ge=1)
    num_queries: int | None = Field(None, ge=1)
    """Of each set at most so many, the first ones; null: all."""
    num_engines: int = Field(0, ge=0)
    """Engines for evaluation alone: each is started on the weights of one version, exported for it, and training goes
    on meanwhile. 0: the generators do it, and the learner waits."""
    temperature: float | None = Field(None, ge=0, le=2)
    """null: as in training. 0: greedy, one sample of each query."""
    top_p: float | None = Field(None, gt=0, le=1)
    """null: as in training."""
    rollout_groups: int = Field(4, ge=0)
    """Of each set, the first so many questions are written with their responses to evaluation_rollouts.jsonl."""
    samples_per_query: int = Field(16, ge=1)
    """n: of the unbiased estimators of pass@k, avg@n and maj@n."""
    pass_at: tuple[int, ...] = Field((1, 8), min_length=1)
    """k of the pass@k to report; 1 among them, none above samples_per_query."""
    deadline_s: float = Field(600, gt=0)
    """For one set."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationConfig:
        if self.temperature == 0 and self.samples_per_query > 1:
            raise ValueError(
                f"temperature=0 (greedy) gives the same sample each time: set samples_per_query to 1 instead of "
                f"{self.samples_per_query}, and pass_at to [1]"
            )
        if 1 not in self.pass_at or not all(1 <= k <= self.samples_per_query for k in self.pass_at):
            raise ValueError(
                f"pass_at={list(self.pass_at)} must hold 1, and no k above samples_per_query={self.samples_per_query}: "
                "draw more samples or drop the largest k"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    """Besides the one at the end, and the one when the run is told to end."""
    dir: AbsolutePath | None = None
    """null: checkpoints/ in run.dir. No two runs may share one."""
    keep: int = Field(2, ge=1)
    """Complete ones that stay; an older one goes only when the new one is on the disk."""
    deadline_s: float = Field(600, gt=0)
    grace_s: float = Field(25, gt=0)
    """After SIGTERM: the step under way and a checkpoint must be done by then; the run ends in any case."""


class TelemetryConfig(Section):
    tensorboard: bool = True
    rollout_groups_per_step: int = Field(1, ge=0)
    """Groups of each step written to rollouts.jsonl for reading."""


class ClusterConfig(Section):
    """Where the actors run."""

    device: Literal["cpu", "cuda"] = "cuda"
    address: str | None = None
    """Ray cluster to join; null: the one in RAY_ADDRESS (a submitted job has it), else a local one."""
    cpus_per_engine: float = Field(1, ge=0)
    cpus_per_rank: float = Field(1, ge=0)
    cpus_per_verifier: float = Field(1, ge=0)
    """For each worker process."""
    cpus_per_environment: float = Field(1, ge=0)
    """For each actor of an environment: its processes mostly wait for the engines."""
    threads_per_process: int = Field(1, ge=1)
    """OMP_NUM_THREADS of engines and learner ranks."""
    start_deadline_s: float = Field(300, gt=0)
    """Placement must succeed by then."""
    stall_deadline_s: float = Field(900, gt=0)
    """No optimiser step for so long ends the run with a report of who waits for what."""
    liveness_deadline_s: float = Field(60, gt=0)
    """An engine or learner rank that gives no sign of life for so long is killed and started again."""
