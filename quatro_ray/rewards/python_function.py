"""A user's own function as a reward."""

from __future__ import annotations

from quatro_ray.config import PythonRewardConfig
from quatro_ray.isolation.user_function import load_function
from quatro_ray.types import Query, Response


class PythonReward:
    """The number that the user's function returns.

    Raises:
        ConfigError: the function cannot be loaded.
    """

    def __init__(self, config: PythonRewardConfig) -> None:
        self._name = config.function
        self._function = load_function(config.function)

    def __call__(self, query: Query, response: Response) -> float:
        """Return the reward.

        Raises:
            TypeError: the function returned no number.
            Exception: whatever the function raises.
        """
        reward = self._function(query, response)
        try:
            return float(reward)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self._name} must return a number, not {type(reward).__name__}") from error
