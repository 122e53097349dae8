"""lm-evaluation-harness loads an export and scores it as greedy decoding does. Needs `pip install '.[harness]'`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.conftest import Ring

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is in no lock; docs/evaluation.md says how to install it")
MAX_TOKENS = 8


def greedy(path: Path, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
        answers.append(tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def task(rows: Path) -> dict[str, Any]:
    return {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def test_an_export_scores_as_it_decodes(ring: Ring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ring.run(ring.parts.learner.export(tmp_path / "export", 60))
    prompts = [f"{a}+{b}=" for a in (3, 12) for b in (4, 5, 67)]
    answers = greedy(tmp_path / "export", prompts)
    right = [a if i % 2 else a + "?" for i, a in enumerate(answers)]  # half of them
    rows = [{"question": p, "answer": a} for p, a in zip(prompts, right, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'export'},dtype=float32,device=cpu",
        tasks=[task(tmp_path / "rows.jsonl")],
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(found["samples"]["sums"], key=lambda s: s["doc_id"])
    assert [s["resps"][0][0] for s in samples] == answers
    assert found["results"]["sums"]["exact_match,none"] == 0.5
