"""One rank of the ZeRO-3 learner group, as a plain class: every method is a collective over all ranks.

Shape letters: Q queries, G rollouts of a query, N tokens of a micro-batch, M response tokens of the global batch.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from quatro_ray.engines import zero_checkpoint
from quatro_ray.engines.batch_training import BatchTrainer
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.lora import ADAPTER_FOLDER, Forward, is_adapter, peft_names
from quatro_ray.engines.model_files import write_model
from quatro_ray.engines.policy import PolicyModel, as_on_disk, persistent_buffers
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.engines.sequence_parallel import Ranks, SequenceGroup
from quatro_ray.engines.varlen_attention import VARLEN
from quatro_ray.engines.zero_engine import ZeroEngine
from quatro_ray.errors import CheckpointError, ConfigError
from quatro_ray.types import LearnerBatch, RowLayout, StepMetrics
from quatro_ray.weight_sync.agreement import Scored, fixed_sequences

if TYPE_CHECKING:
    from quatro_ray.weight_sync.zero_source import ZeroWeightSource

_logger = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Loaded:
    """State that `start` creates."""

    policy: PolicyModel
    engine: ZeroEngine
    trainer: BatchTrainer


class LearningEngine:
    """Holds the policy and trains it, batch by batch. Methods that need `start` raise RuntimeError before it.

    Attributes:
        version: batches that training was attempted on; the number of the policy that the weights are.
    """

    def __init__(self, spec: LearnerSpec, *, rank: int) -> None:
        self._spec = spec
        self._config = spec.config
        self._rank = rank
        self._ranks = Ranks(rank, spec.config.num_ranks, spec.config.sequence_parallel_size)
        self._device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")
        self._started: _Loaded | None = None
        self._sequence_group: SequenceGroup | None = None
        self.version = 0

    @property
    def _loaded(self) -> _Loaded:
        if self._started is None:
            raise RuntimeError("start() must be called first")
        return self._started

    def _open_store(self, address: str, port: int) -> dist.TCPStore:
        """Return the store at which the ranks meet. Rank 0 listens on the given address only, not on all interfaces."""
        listener = None
        if self._rank == 0:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family).detach()  # the store closes it
        return dist.TCPStore(
            address,
            port,
            self._config.num_ranks,
            is_master=self._rank == 0,
            timeout=timedelta(seconds=self._config.step_deadline_s),
            master_listen_fd=listener,
        )

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group and load the model, sharded over the ranks."""
        import deepspeed

        _seed_everything(self._spec.seed)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_per_process_memory_fraction(self._spec.device_share)
        # torch.distributed is initialised before DeepSpeed, which would bind the group to a device; groups created
        # beside such a one, as for weight transfer, were seen to hang
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=self._open_store(master_address, master_port),
            rank=self._rank,
            world_size=self._config.num_ranks,
            timeout=timedelta(seconds=self._config.step_deadline_s),
        )
        os.environ.setdefault("LOCAL_RANK", "0")
        # on CPU DeepSpeed would compile a collective that training does not use: that takes a minute and a compiler,
        # and a build that is killed leaves a lock in the home folder, on which every later start waits for ever
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        self._sequence_group = self._ranks.make_group(self._config.step_deadline_s)
        policy = self._load_policy(self._deepspeed_config())
        optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=self._config.learning_rate,
            betas=(self._config.adam_beta1, self._config.adam_beta2),
            weight_decay=self._config.weight_decay,
            fused=True,
        )
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=self._schedule(optimizer),
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        reference = self._reference(policy, engine) if self._config.reference_kl_coef > 0 else None
        trainer = BatchTrainer(
            self._spec,
            ranks=self._ranks,
            device=self._device,
            engine=engine,
            reference=reference,
            row_layout=policy.row_layout,
        )
        self._started = _Loaded(policy, engine, trainer)

    @cached_property
    def weights(self) -> ZeroWeightSource:
        """The policy's parameters as a vLLM weight source; iterating over it is a collective."""
        policy = self._loaded.policy
        return self._source(policy.parameters_by_name(), policy.as_on_disk)

    @cached_property
    def adapter_weights(self) -> ZeroWeightSource:
        """The adapters alone, under their names in peft's files; empty without adapters."""
        named = self._loaded.policy.parameters_by_name()
        return self._source({name: p for name, p in named.items() if is_adapter(name)}, peft_names)

    @property
    def sent_weights(self) -> ZeroWeightSource:
        """The part of the policy that engines get."""
        lora = self._config.lora
        return self.adapter_weights if lora is not None and lora.sync == "adapter" else self.weights

    def _source(
        self, parameters: dict[str, nn.Parameter], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> ZeroWeightSource:
        # imported here, because training alone, as benchmarks.gpu.learner does it, does not need vLLM
        from quatro_ray.weight_sync.zero_source import ZeroWeightSource

        return ZeroWeightSource(parameters, convert)

    @property
    def row_rank(self) -> int:
        """Which rows of a batch are this rank's: its place in LearnerBatch.cells."""
        return self._ranks.row_rank

    @property
    def row_layout(self) -> RowLayout:
        """How batches are to be packed for this model (engines/forward_check.py measures it)."""
        return self._loaded.policy.row_layout

    def _load_policy(self, zero_config: dict[str, Any]) -> PolicyModel:
        """Load the starting policy; all ranks choose the same row layout."""
        policy, line = load_policy(
            self._spec.model_path,
            dtype=_DTYPES[self._config.dtype],
            attn_implementation=self._config.attn_implementation,
            temperature=self._spec.temperature,
            chunk_tokens=self._config.logprob_chunk_tokens,
            gradient_checkpointing=self._config.gradient_checkpointing,
            lora=self._config.lora,
            device=self._device,
            zero_config=zero_config,
        )
        _logger.info("rank %d: %s", self._rank, line)
        pads = torch.tensor(float(policy.row_layout == "padded"), device=self._device)
        dist.all_reduce(pads, dist.ReduceOp.MAX)
        policy.row_layout = "padded" if pads else "packed"
        policy.sequence_group = self._sequence_group
        if policy.sequence_group:
            self._check_sharing(policy, line)
        return policy

    def _check_sharing(self, policy: PolicyModel, line: str) -> None:
        """Raise ConfigError if ranks that share a row would compute something else than one rank."""
        name = f"learner.sequence_parallel_size={self._ranks.group_size}"
        if (policy.row_layout, policy.attention) != ("packed", VARLEN):
            raise ConfigError(
                f"{name}: needs a model that can be packed with the attention varlen; {line}; set it to 1"
            )
        rope = str(getattr(policy.causal_lm.config.get_text_config(), "rope_parameters", None))
        if any(kind in rope for kind in ("longrope", "dynamic")):
            raise ConfigError(
                f"{name}: the model's RoPE depends on the longest position in a row, of which each rank sees a part; "
                "set it to 1"
            )

    def _reference(self, policy: PolicyModel, engine: ZeroEngine) -> Forward:
        """Return the forward pass of the starting policy; without adapters it has weights of its own."""
        import deepspeed

        if policy.adapters:
            return policy.adapters.without(engine)
        config = self._deepspeed_config()
        config["zero_optimization"].pop("zero_hpz_partition_size", None)  # copies are for backward passes
        reference = self._load_policy(config).requires_grad_(False)
        own: ZeroEngine
        own, *_ = deepspeed.initialize(model=reference, config=config, dist_init_required=False)
        return own

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        from transformers import get_scheduler

        schedule = self._config.schedule
        name = "constant_with_warmup" if schedule == "constant" else schedule
        made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            name,
            optimizer,
            self._config.num_warmup_steps,
            self._spec.num_steps * self._config.num_minibatches,
        )
        return made

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self._config
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": False,
            # a buffer of float32 numbers: 0.2 GiB, and 2 by default, as much as the gradients of a small model
            "reduce_bucket_size": 50_000_000,
        }
        if config.hpz_partition_size > 1:
            zero["zero_hpz_partition_size"] = config.hpz_partition_size
        host = {"device": "cpu", "pin_memory": self._device.type == "cuda"}
        if config.offload == "cpu":
            zero["offload_optimizer"] = host
        if config.offload_parameters:
            zero["offload_param"] = host
        return {
            # micro-batches are packed by tokens, and their number is set by train_step for every step
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
            "bf16": {"enabled": config.dtype == "bfloat16"},
            # the sums over micro-batches and ranks; one in bfloat16 is off by a percent after a hundred
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def train_step(self, batch: LearnerBatch, learner_version: int) -> StepMetrics:
        """Attempt the optimiser steps of a batch and return its metrics, the same on every rank.

        If no query of a minibatch prefers anything, its step is not taken (`step/uninformative` is their share). If a
        loss or gradient is not finite on any rank, all ranks skip the update and `step/skipped` is 1. The version
        counts the attempt in both cases, so that no number ever means two policies.

        Raises:
            RuntimeError: the batch was made for another version, and training on it would let the ranks drift apart.
        """
        trainer = self._loaded.trainer
        if learner_version != self.version:
            raise RuntimeError(f"rank {self._rank} is at version {self.version}, asked to train from {learner_version}")
        metrics = trainer.train(batch)
        self.version += 1
        if self._spec.frees_memory and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return metrics

    def logprobs(self, batch: LearnerBatch) -> list[NDArray[np.float32]]:
        """Return the log-probs of the targets of this rank's micro-batches under the present weights.

        Returns:
            float32 [N] for each micro-batch, nats, 0 outside responses.
        """
        trainer = self._loaded.trainer
        return [trainer.logprobs(micro).cpu().numpy() for micro in trainer.own_rows(batch)]

    @torch.no_grad()
    def score_fixed(self, max_tokens: int) -> list[Scored]:
        """Score the fixed sequences of weight_sync/agreement.py under the present weights; a collective.

        Args:
            max_tokens: longest sequence that an engine takes.
        """
        policy = self._loaded.policy
        sequences = fixed_sequences(policy.vocab_size, max_tokens)
        scored = []
        for ids in sequences:
            tokens = torch.tensor(ids, device=self._device)
            positions = torch.arange(len(ids) - 1, device=self._device)
            with policy.at_temperature(1.0):
                logprobs, _ = self._loaded.engine(tokens[:-1], positions, tokens[1:])
            scored.append(Scored(ids, logprobs.cpu().numpy()))
        return scored

    def parameter_checksums(self, dtypes: Mapping[str, str]) -> dict[str, str]:
        """Return dtype, shape and checksum of the present weights (weight_sync/checksums.py); a collective.

        Args:
            dtypes: what each parameter is cast to, by its name on disk; the others are left out.

        Returns:
            The same as a worker of an engine returns for these parameters; on other ranks than 0 nothing.
        """
        from quatro_ray.weight_sync.checksums import tensor_checksum

        found = {}
        for name, tensor in self.weights:
            if self._rank == 0 and name in dtypes:
                found[name] = tensor_checksum(tensor.to(getattr(torch, dtypes[name])))
        return found

    def save_checkpoint(self, folder: Path) -> None:
        """Write DeepSpeed's own format; each rank writes its shard of weights and optimiser states.

        A checkpoint takes 12 bytes per trained parameter, over all ranks; frozen ones are not in it.

        Args:
            folder: new or empty; shards left there by a larger number of ranks would be read as part of this one.
        """
        trainer = self._loaded.trainer
        state = zero_checkpoint.ClientState(
            version=self.version,
            step_control_kept=steps.kept if (steps := trainer.step_control) else 1.0,
            entropy_coef=entropy.coef if (entropy := trainer.entropy_control) else 0.0,
            random_states=zero_checkpoint.random_states(self._device),
        )
        engine = self._loaded.engine
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state=state, save_latest=False, exclude_frozen_parameters=True
        )

    def load_checkpoint(self, folder: Path, version: int | None = None) -> None:
        """Restore weights, optimiser, schedule, step control, random states and version.

        If as many ranks saved it, training continues bit for bit. Otherwise DeepSpeed's universal format is written
        beside `folder` while it loads, and all ranks take the random states of rank 0. The reference policy stays that
        of `model_path`.

        Args:
            folder: the checkpoint, visible to every rank.
            version: replaces the saved version, so that after a roll-back no number means two policies.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, or of another model or dtype.
        """
        state = zero_checkpoint.load(self._loaded.engine, folder)
        self.version = state["version"] if version is None else version
        trainer = self._loaded.trainer
        if trainer.step_control:
            trainer.step_control.kept = state["step_control_kept"]
        if trainer.entropy_control:
            trainer.entropy_control.coef = state.get("entropy_coef", 0.0)
        zero_checkpoint.restore_random_states(state["random_states"], self._device)

    def export(self, path: Path) -> None:
        """Gather the weights, a collective, and let rank 0 write them in Hugging Face format.

        Adapters are merged, and are in the folder `adapter` in peft's format too.

        Raises:
            CheckpointError: the folder cannot be written. The learner lives on.
        """
        state, of_adapters = self._on_rank_0(self.weights), self._on_rank_0(self.adapter_weights)
        failure: Exception | None = None
        if self._rank == 0:
            policy = self._loaded.policy
            model = policy.causal_lm
            try:
                write_model(path, state | as_on_disk(model, persistent_buffers(model)), self._spec.model_path)
                if policy.adapters:
                    policy.adapters.write(path / ADAPTER_FOLDER, of_adapters, self._spec.model_path)
            except (OSError, ValueError) as error:  # the other ranks wait at the barrier
                failure = error
        dist.barrier()
        if failure is not None:
            raise CheckpointError(f"export {path}: cannot be written ({failure}); correct it, then resume") from failure

    def _on_rank_0(self, source: ZeroWeightSource) -> dict[str, Tensor]:
        """Return all tensors of a source in host memory on rank 0, and nothing on the others; a collective."""
        return {name: tensor.cpu() for name, tensor in source if self._rank == 0}

    def shutdown(self) -> None:
        """Leave the process group, if this rank has joined one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
