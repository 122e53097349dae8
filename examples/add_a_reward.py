"""A custom reward: a function, and one line of configuration. Run it from the project's root:

    .venv/bin/python examples/add_a_reward.py

It trains the tiny model of examples/own_prompts for a few steps. In a configuration file the line is

    rewards:
      early: {kind: python, function: examples/add_a_reward.py:early}
"""

from quatro_ray.types import Query, Response


def early(query: Query, response: Response) -> float:
    """Return 1 if the response begins with the answer, less the later it occurs, and 0 if it does not occur."""
    position = response.text.find(query.answer)
    return 0.0 if position < 0 else 1.0 / (1 + position)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from quatro_ray.config import load_config
    from quatro_ray.jobs.train import train

    overrides = [
        "rewards={early: {kind: python, function: 'examples/add_a_reward.py:early'}}",
        "run.dir=runs/add_a_reward",
        "run.num_steps=3",
        *sys.argv[1:],
    ]
    print(f"report: {train(load_config(Path('examples/own_prompts/config.yaml'), overrides))}")
