"""Which arguments of vLLM's engines `generator.engine_args` may contain, by what they change.

Arguments that change what an engine computes, such as `quantization`, `kv_cache_dtype` or `speculative_config`, are
allowed: behaviour log-probs are those of the engine that sampled, and how far it is from the learner is measured after
the first weight update and then regularly (weight_sync.max_logprob_abs_diff).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_SET_BY_US = {
    "model", "tokenizer", "dtype", "seed", "max_num_seqs", "max_model_len", "tensor_parallel_size",
    "pipeline_parallel_size", "data_parallel_size",
    "gpu_memory_utilization", "logprobs_mode", "weight_transfer_config", "enable_prefix_caching",
    "kv_cache_memory_bytes", "max_num_batched_tokens", "hf_token",
    "worker_extension_cls", "enable_lora", "enable_sleep_mode",
}  # fmt: skip
_REASONS = {
    "quatro_ray sets these from its own fields, and a token belongs in the environment (HF_TOKEN)": _SET_BY_US,
    "quatro_ray places each engine on devices of one node; use tensor_parallel_size, pipeline_parallel_size and "
    "data_parallel_size of generator": {
        "prefill_context_parallel_size", "decode_context_parallel_size", "nnodes", "node_rank", "master_addr",
        "master_port", "device_ids", "distributed_executor_backend", "enable_elastic_ep", "worker_cls",
        "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_address",
        "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb",
        "data_parallel_multi_port_external_lb", "data_parallel_backend",
    },
    "they change what is sampled without a trace in the log-probs of tokens, so importance ratios would be wrong": {
        "logits_processors", "watermark_config", "override_generation_config", "diffusion_config",
    },
    "engines of quatro_ray generate text with the policy's own weights": {
        "runner", "convert", "skip_tokenizer_init", "kv_transfer_config", "ec_transfer_config", "load_format",
        "tokens_only",
    },
}  # fmt: skip


def refused(names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each reason why some of these arguments may not be given."""
    given = sorted(names)
    for reason, group in _REASONS.items():
        if taken := [name for name in given if name in group]:
            yield f"engine_args may not contain {', '.join(taken)}: {reason}; remove them"
