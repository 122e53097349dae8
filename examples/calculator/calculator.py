"""An environment with a tool: a policy that learns to use a calculator. From the project's root:

    .venv/bin/python examples/calculator/calculator.py

makes demonstrations of which half use the calculator and half guess, warms a tiny model up on them, and trains it. An
episode reads `123+45=[123+45]168;168`: the policy asks in brackets, is given the result, and answers.
"""

import json
import random
import re
from pathlib import Path

from quatro_ray.environments.base import Policy
from quatro_ray.types import Query


def episode(query: Query, policy: Policy) -> dict[str, float]:
    """Answer the policy's calls until a turn contains none; their number is logged as `calls`."""
    calls = 0
    while (turn := policy.generate(stop=["]"])) is not None:
        if not (call := re.search(r"\[(.*)\]$", turn.text)):
            break
        policy.give(f"{calculate(call[1])};")
        calls += 1
    return {"calls": float(calls)}


def calculate(expression: str) -> str:
    """Return the sum of whole numbers, or `?` for anything else: text of a model is never executed."""
    if not re.fullmatch(r"\d{1,9}([+-]\d{1,9}){0,9}", expression):
        return "?"
    return str(sum(int(term) for term in re.findall(r"[+-]?\d+", expression)))


def demonstrations(questions: list[Query], rng: random.Random) -> list[dict[str, str]]:
    """Return rows to imitate, one for each turn: the text so far, and the policy's next turn."""
    rows = []
    for query in questions:
        if rng.random() < 0.5:
            call = f"[{query.prompt.removesuffix('=')}]"
            rows.append({"prompt": query.prompt, "answer": call})
            rows.append({"prompt": f"{query.prompt}{call}{query.answer};", "answer": query.answer})
        else:
            rows.append({"prompt": query.prompt, "answer": rng.choice(questions).answer})
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    import sys

    from quatro_ray.config import load_config
    from quatro_ray.data.registry import make_dataset
    from quatro_ray.jobs.train import train

    config = load_config(Path("examples/calculator/config.yaml"), sys.argv[1:])
    dataset = make_dataset(config.data, config.rewards)
    path = Path("runs/calculator_demonstrations.jsonl")
    path.parent.mkdir(exist_ok=True)
    rows = demonstrations(list(dataset.train["sums"]), random.Random(0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [*sys.argv[1:], f"data.warmup={{kind: jsonl, path: {path}}}"]
    print(f"report: {train(load_config(Path('examples/calculator/config.yaml'), overrides))}")
