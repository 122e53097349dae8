"""Which arguments of vLLM's engines `generator.engine_args` may contain, by what they change.

Arguments that change what an engine computes, such as `quantization`, `kv_cache_dtype` or `speculative_config`, are
allowed: behaviour log-probs are those of the engine that sampled, and how far it is from the learner is measured after
the first weight update and then regularly (weight_sync.max_logprob_abs_diff).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_SET_BY_US = {
    "model", "tokenizer", "dtype", "seed", "tensor_parallel_size", "max_num_seqs", "max_model_len",
    "gpu_memory_utilization", "logprobs_mode", "weight_transfer_config", "enable_prefix_caching",
    "kv_cache_memory_bytes", "max_num_batched_tokens", "hf_token",
}  # fmt: skip
_REASONS = {
    "quatro_ray sets these from its own fields, and a token belongs in the environment (HF_TOKEN)": _SET_BY_US,
    "quatro_ray places engines, and gives each one tensor_parallel_size devices of one node; use num_engines and "
    "tensor_parallel_size": {
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size", "nnodes",
        "node_rank", "master_addr", "master_port", "device_ids", "distributed_executor_backend", "enable_elastic_ep",
        "worker_cls",
    },
    "they change what is sampled without a trace in the log-probs of tokens, so importance ratios would be wrong": {
        "logits_processors", "watermark_config", "override_generation_config", "diffusion_config",
    },
    "engines of quatro_ray generate text with the policy's own weights, load no adapters and never sleep": {
        "runner", "convert", "enable_lora", "enable_sleep_mode", "skip_tokenizer_init", "kv_transfer_config",
        "ec_transfer_config", "load_format", "tokens_only",
    },
}  # fmt: skip
_PREFIXES = {"data_parallel_": "pipeline_parallel_size"}
"""Names that begin so are treated as that argument is."""


def refused(names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each reason why some of these arguments may not be given."""
    given = sorted(names)
    alike = {
        name: next((like for prefix, like in _PREFIXES.items() if name.startswith(prefix)), name) for name in given
    }
    for reason, group in _REASONS.items():
        if taken := [name for name in given if alike[name] in group]:
            yield f"engine_args may not contain {', '.join(taken)}: {reason}; remove them"
