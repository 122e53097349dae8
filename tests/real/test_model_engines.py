"""What engines are checked for: experts that vLLM packs follow an update, and sampled log-probs are those of scores."""

from benchmarks import engine_arguments
from benchmarks.model_engines import MAX_NATS, in_a_process


def test_an_engine_of_experts_agrees_before_and_after_an_update() -> None:
    found = in_a_process("Qwen3-MoE", with_export=False)
    assert found.keys() == {"engine", "after an update"}, found
    assert all(isinstance(value, float) and value < MAX_NATS for value in found.values()), found


def test_the_check_finds_that_speculative_decoding_is_wrong_on_cpu() -> None:
    """If this fails, vLLM has mended it: then Config may allow it."""
    found = engine_arguments.in_a_process("speculative decoding (n-grams)")
    assert not found["before"]["sampling_error"] < MAX_NATS
    assert abs(found["before"]["deviations"]) > 10
