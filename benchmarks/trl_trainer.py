"""What benchmarks/against_trl.py compares with: TRL's GRPOTrainer on the same model, data and reward.

    python -m benchmarks.trl_trainer DATA FOLDER --config JSON

Writes FOLDER/metrics.jsonl, one line a step, with the tokens it trained on and the mean reward.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.counting import START


class Record(TrainerCallback):
    """Scores responses, and writes a line at the end of each step."""

    __name__ = "right"

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._tokens: list[int] = []
        self._rewards: list[float] = []

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        rewards = [float(text == right) for text, right in zip(completions, answer, strict=True)]
        self._tokens += [len(ids) for ids in completion_ids]
        self._rewards += rewards
        return rewards

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mean = sum(self._rewards) / len(self._rewards)
        line = {"step": state.global_step, "tokens/trained": sum(self._tokens), "reward/mean": mean}
        self._file.write(json.dumps(line) + "\n")
        self._tokens.clear()
        self._rewards.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=json.loads, help="settings of GRPOConfig")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    torch.set_num_threads(2)
    record = Record(arguments.folder / "metrics.jsonl")
    trainer = GRPOTrainer(
        model=str(START),
        reward_funcs=record,
        args=GRPOConfig(output_dir=str(arguments.folder), use_cpu=True, bf16=False, **arguments.config),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(START, padding_side="left"),
        callbacks=[record],
    )
    trainer.train()


if __name__ == "__main__":
    main()
