"""Which architectures of transformers the learner trains: a table over tiny random models, for docs/models.md.

    python -m benchmarks.models [--dtype bfloat16] [NAME ...]

Each model is measured as the learner measures it when it loads one (quatro_ray/engines/forward_check.py). It ends
with one JSON line, and exits 1 if fewer than 25 architectures train.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

_DENSE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEAD = _DENSE | {"head_dim": 32}
_MULTI_HEAD = _DENSE | {"num_key_value_heads": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GPT = {"vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MAMBA = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _DENSE),
    "Llama 4 (text)": (
        "Llama4TextConfig",
        _HEAD | {"intermediate_size_mlp": 128, "num_local_experts": 2, "attention_chunk_size": 16, "pad_token_id": 0},
    ),
    "Qwen2": ("Qwen2Config", _DENSE),
    "Qwen3": ("Qwen3Config", _HEAD),
    "Qwen2-MoE": ("Qwen2MoeConfig", _DENSE | _MOE | {"shared_expert_intermediate_size": 64}),
    "Qwen3-MoE": ("Qwen3MoeConfig", _HEAD | _MOE),
    "Qwen3-Next": ("Qwen3NextConfig", _HEAD | _MOE | _LINEAR | {"shared_expert_intermediate_size": 32}),
    "Qwen3.5 (text)": ("Qwen3_5TextConfig", _HEAD | _LINEAR),
    "Mistral": ("MistralConfig", _HEAD),
    "Mixtral": ("MixtralConfig", _DENSE | {"num_local_experts": 4}),
    "Gemma": ("GemmaConfig", _HEAD),
    "Gemma 2": ("Gemma2Config", _HEAD | {"query_pre_attn_scalar": 32}),
    "Gemma 3 (text)": ("Gemma3TextConfig", _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        _DENSE | {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 128, "attention_window_size": 32},
    ),
    "Phi": ("PhiConfig", _MULTI_HEAD),
    "Phi-3": ("Phi3Config", _DENSE | {"pad_token_id": 0}),
    "OLMo 2": ("Olmo2Config", _DENSE),
    "OLMo 3": ("Olmo3Config", _DENSE | {"sliding_window": 16}),
    "OLMoE": ("OlmoeConfig", _DENSE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        _MULTI_HEAD
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "gpt-oss": ("GptOssConfig", _HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "Cohere": ("CohereConfig", _DENSE),
    "Cohere 2": ("Cohere2Config", _DENSE | {"sliding_window": 16}),
    "Granite": ("GraniteConfig", _DENSE | {"logits_scaling": 4.0}),
    "Granite 4 (hybrid)": (
        "GraniteMoeHybridConfig",
        _DENSE
        | _MAMBA
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64}
        | {"mamba_n_heads": 16},
    ),
    "GLM-4": ("Glm4Config", _HEAD | {"pad_token_id": 0}),
    "SmolLM3": ("SmolLM3Config", _DENSE | {"pad_token_id": 0}),
    "EXAONE 4": ("Exaone4Config", _DENSE),
    "ERNIE 4.5": ("Ernie4_5Config", _DENSE),
    "StableLM": ("StableLmConfig", _DENSE),
    "StarCoder2": ("Starcoder2Config", _DENSE),
    "LFM2": ("Lfm2Config", _DENSE | {"layer_types": ["conv", "full_attention"]}),
    "Falcon (ALiBi)": ("FalconConfig", _DENSE | {"alibi": True}),
    "Falcon-H1": (
        "FalconH1Config",
        _DENSE | _MAMBA | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "lm_head_multiplier": 2.0},
    ),
    "Bamba": ("BambaConfig", _DENSE | _MAMBA | {"attn_layer_indices": [1], "mamba_n_heads": 16}),
    "Jamba": (
        "JambaConfig",
        _DENSE
        | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"use_mamba_kernels": False, "mamba_d_state": 8},
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        _HEAD
        | {"hybrid_override_pattern": "M*", "mamba_num_heads": 16, "mamba_head_dim": 16, "ssm_state_size": 16}
        | {"n_groups": 1, "chunk_size": 16},
    ),
    "Zamba2": (
        "Zamba2Config",
        _DENSE
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"], "mamba_d_state": 16}
        | {"n_mamba_heads": 16, "mamba_ngroups": 1, "chunk_size": 16, "num_mem_blocks": 1},
    ),
    "MiniMax": (
        "MiniMaxConfig",
        _HEAD | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "Mamba": ("MambaConfig", {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}),
    "Mamba 2": (
        "Mamba2Config",
        {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 16, "head_dim": 16}
        | {"n_groups": 1, "state_size": 16, "chunk_size": 16},
    ),
    "RWKV": ("RwkvConfig", {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "context_length": 512}),
    "GPT-2": ("GPT2Config", _GPT),
    "GPT-J": ("GPTJConfig", _GPT | {"rotary_dim": 16}),
    "GPT-NeoX": ("GPTNeoXConfig", {k: v for k, v in _DENSE.items() if k != "num_key_value_heads"}),
    "BLOOM": ("BloomConfig", {"vocab_size": 256, "hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "MPT": ("MptConfig", {"vocab_size": 256, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "OPT": ("OPTConfig", _MULTI_HEAD | {"ffn_dim": 256, "word_embed_proj_dim": 128}),
}
"""Name, class of its configuration in transformers, and the fields that make a tiny model of it."""


def make(name: str, dtype: Any = None) -> Any:
    """Return a tiny random model whose log-probs are far from uniform, so that a leak shows."""
    import torch
    import transformers

    kind, fields = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:  # an architecture without it
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(dtype or torch.float32).eval()


def measure(name: str, dtype: Any = None) -> tuple[str, str]:
    """Return the row layout, or "refused", and the line that the learner logs or the user sees."""
    from quatro_ray.engines.forward_check import ForwardCheck
    from quatro_ray.engines.policy import PolicyModel
    from quatro_ray.engines.policy_loading import choose_attention
    from quatro_ray.engines.varlen_attention import VARLEN
    from quatro_ray.errors import ConfigError

    model = make(name, dtype)
    try:
        check = ForwardCheck(model, name, temperature=0.8)
        policy = PolicyModel(model, temperature=0.8, chunk_tokens=32)
        line = choose_attention(policy, check, (VARLEN, policy.attention))
        return policy.row_layout, line
    except ConfigError as error:
        return "refused", str(error)


def main() -> int:
    """Print a table, and a line of JSON."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=None)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    print("| architecture | layout | measured |\n|---|---|---|")
    for name in arguments.names or ARCHITECTURES:
        found[name], line = measure(name, getattr(torch, arguments.dtype))
        print(f"| {name} | {found[name]} | {line.removeprefix(f'{name}: ')} |", flush=True)
    counts = {layout: list(found.values()).count(layout) for layout in ("packed", "padded", "refused")}
    print(json.dumps({"dtype": arguments.dtype, **counts}))
    trained = counts["packed"] + counts["padded"]
    return 0 if trained >= min(25, len(found)) else 1


if __name__ == "__main__":
    sys.exit(main())
