"""An engine follows an update of the learner, for an architecture whose weights vLLM packs; docs/models.md has all."""

from benchmarks.model_engines import MAX_NATS, in_a_process


def test_an_engine_of_experts_agrees_before_and_after_an_update() -> None:
    found = in_a_process("Qwen3-MoE", with_export=False)
    assert found.keys() == {"engine", "after an update"}, found
    assert all(isinstance(value, float) and value < MAX_NATS for value in found.values()), found
