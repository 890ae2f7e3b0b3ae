"""Games of gymnasium, several of one kind that step together: what a policy sees and does.

A game begins in a given state, and is never restarted. A step takes the actions (b,), and returns
what the policy sees next (b, s), the rewards (b,) and whether a game is over (b,). What it returns
for a game that was over before means nothing.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gaf_lab.settings.checks import ConfigError

HELD = 4  # steps that an action of Acrobot lasts
Moved = tuple[np.ndarray, np.ndarray, np.ndarray]


class Games(Protocol):
    def begin(self, states: np.ndarray) -> np.ndarray:
        """Puts the games into states (b, 4); what the policy sees (b, s)."""

    def step(self, actions: np.ndarray) -> Moved: ...


class Poles:
    """CartPole: a step is rewarded by 1, and a game is over when the pole has fallen."""

    def __init__(self, count: int) -> None:
        made = import_gymnasium().make_vec(
            "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point"
        )
        self.environment: Any = made.unwrapped

    def begin(self, states: np.ndarray) -> np.ndarray:
        self.environment.reset(seed=0)
        self.environment.state = states.T.copy()
        return states.astype(np.float32)

    def step(self, actions: np.ndarray) -> Moved:
        seen, _, fallen, *_ = self.environment.step(actions)
        return seen, np.ones(len(actions)), fallen


class Acrobots:
    """Acrobot: a step is rewarded by -1, until the tip of the second link is high enough.

    An action lasts HELD steps: pushes that change at every step hardly ever lift the tip, so that
    some runs would see no difference between rewards.
    """

    def __init__(self, count: int) -> None:
        make = import_gymnasium().make
        self.environments: list[Any] = [make("Acrobot-v1").unwrapped for _ in range(count)]

    def begin(self, states: np.ndarray) -> np.ndarray:
        for environment, state in zip(self.environments, states, strict=True):
            environment.reset(seed=0)
            environment.state = state
        cos, sin = np.cos(states[:, :2]), np.sin(states[:, :2])
        angles = np.stack([cos, sin], 2).reshape(len(states), 4)
        self.seen = np.concatenate([angles, states[:, 2:]], 1).astype(np.float32)
        self.over = np.zeros(len(states), dtype=bool)
        return self.seen.copy()

    def step(self, actions: np.ndarray) -> Moved:
        rewards = np.zeros(len(actions))
        for i in np.flatnonzero(~self.over):
            found = play_on(self.environments[i], actions[i])
            self.seen[i], rewards[i], self.over[i] = found
        return self.seen.copy(), rewards, self.over.copy()


def play_on(environment: Any, action: Any) -> tuple[Any, float, bool]:
    """Takes one action HELD times, or until the game is over: its end, and the rewards' sum."""
    reward = 0.0
    for _ in range(HELD):
        seen, one, over, *_ = environment.step(action)
        reward += one
        if over:
            break
    return seen, reward, over


@dataclass(frozen=True)
class Game:
    """A kind of game: what makes it, and how it is played."""

    make: type[Poles] | type[Acrobots]
    seen: int  # numbers that the policy sees
    actions: int
    steps: int  # actions in an episode, at most
    start: float  # largest number of a state that an episode begins in


CARTPOLE = Game(Poles, seen=4, actions=2, steps=200, start=0.05)
ACROBOT = Game(Acrobots, seen=6, actions=3, steps=500 // HELD, start=0.1)


def import_gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise ConfigError(
            "CartPole and Acrobot need gymnasium; it is not installed. "
            "Install it with pip install '.[tasks]'."
        ) from None
    return gymnasium
