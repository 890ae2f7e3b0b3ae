"""Balancing a pole by policy gradient: CartPole, where a micro-batch is a batch of episodes.

A sample is an episode: its number, from which start and actions are drawn, and the sign of its
reward. The model plays the episodes of a micro-batch when it is called, and returns a loss for each
(REINFORCE, with the micro-batch's own mean and deviation as the baseline). With `noise` "task", the
reward of a share `noise_rate` of the episodes has the wrong sign.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaf_lab.data.problem import Metric, Problem
from gaf_lab.data.sampling import generator
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig

EPISODES, TESTED = 50_000, 50
EPISODE_STEPS = 200  # of an episode, at most
DISCOUNT = 0.99
START = 0.05  # largest number of a state that an episode begins in


def cartpole(config: TrainConfig) -> Problem:
    """Episodes of CartPole; the metric is an episode's return, 200 at most.

    `limit` in the config is the number of episodes. Actions are drawn in training; in an evaluation
    they are the likelier ones.
    """
    train, test = episodes(0, EPISODES, config), episodes(EPISODES, TESTED)
    return Problem(
        model=PolicyGradient,
        train=(train, train[:, 1]),
        test=(test, test[:, 1]),
        clean=torch.ones(EPISODES, dtype=torch.int64),
        loss=surrogate_of,
        metric=Metric("return", return_of),
        classes=0,
        name="cartpole",
    )


def episodes(first: int, count: int, config: TrainConfig | None = None) -> Tensor:
    """Numbers and reward signs of episodes (count, 2) int64. config: for wrong signs."""
    sign = torch.ones(count, dtype=torch.int64)
    if config is not None and config.noise == "task":
        draw = generator(config.seed, "reward signs")
        sign[torch.rand(count, generator=draw) < config.noise_rate] = -1
    return torch.stack([torch.arange(first, first + count), sign], 1)


def surrogate_of(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 0]


def return_of(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 1]


class PolicyGradient(nn.Module):
    """A network 4-32-2 that plays: episodes (b, 2) to their losses and returns (b, 2)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        self.environments: dict[int, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        states, actions, alive = (part.to(x.device) for part in self.play(x[:, 0]))
        log_p = self.network(states).log_softmax(2).gather(2, actions[..., None])[..., 0]
        sign = x[:, 1].to(log_p.dtype)
        advantage = advantages(alive * sign[:, None], alive)
        losses = -(log_p * advantage).sum(1) * len(x) / alive.sum()
        return torch.stack([losses, alive.sum(1)], 1)

    @torch.no_grad()
    def play(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States (b, t, 4), actions (b, t), and 1 where an episode was not over (b, t), on the CPU.

        numbers: of the episodes (b,).
        """
        environment = self._environment(len(numbers))
        environment.reset(seed=0)
        draws = [generator(0, "episode", number) for number in numbers.tolist()]
        start = torch.stack([torch.rand(4, generator=draw) for draw in draws])
        luck = torch.stack([torch.rand(EPISODE_STEPS, generator=draw) for draw in draws])
        environment.state = ((2 * start - 1) * START).double().numpy().T.copy()
        state = environment.state.T.astype(np.float32)
        alive, found = torch.ones(len(numbers)), []
        for t in range(EPISODE_STEPS):
            here = torch.from_numpy(state)
            right = self.network(here.to(numbers.device)).softmax(1)[:, 1].cpu()
            action = (right > (luck[:, t] if self.training else 0.5)).long()
            found.append((here, action, alive))
            state, _, fallen, *_ = environment.step(action.numpy())
            alive = alive * torch.from_numpy(~fallen)
            if not alive.any():
                break
        states, actions, lives = zip(*found, strict=True)
        return torch.stack(states, 1), torch.stack(actions, 1), torch.stack(lives, 1)

    def _environment(self, count: int) -> Any:
        """`count` environments that step together; never restarted within EPISODE_STEPS."""
        if count not in self.environments:
            self.environments[count] = make_environments(count)
        return self.environments[count]


def make_environments(count: int) -> Any:
    try:
        import gymnasium
    except ImportError:
        raise ConfigError(
            "cartpole needs gymnasium; it is not installed. Install it with pip install '.[tasks]'."
        ) from None
    made = gymnasium.make_vec(
        "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point"
    )
    return made.unwrapped


def advantages(rewards: Tensor, alive: Tensor) -> Tensor:
    """Discounted sums of later rewards (b, t), scaled to mean 0 and deviation 1 while alive."""
    total, sums = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(1)):
        total = reward + DISCOUNT * total
        sums.append(total)
    returns = torch.stack(sums[::-1], 1)
    mean = (returns * alive).sum() / alive.sum()
    centred = (returns - mean) * alive
    return centred / (centred.square().sum() / alive.sum()).sqrt().clamp_min(1e-6)
