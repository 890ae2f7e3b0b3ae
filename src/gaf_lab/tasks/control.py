"""CartPole and Acrobot by policy gradient, where a micro-batch is a batch of episodes.

A sample is an episode: its number, from which start and actions are drawn, and the sign of its
reward. The model plays the episodes of a micro-batch when it is called, and returns a loss for each
(REINFORCE, with the micro-batch's own mean and deviation as the baseline). With `noise` "task", the
reward of a share `noise_rate` of the episodes has the wrong sign.
"""

from functools import partial

import torch
from torch import Tensor, nn

from gaf_lab.data.problem import Metric, Problem
from gaf_lab.data.sampling import generator
from gaf_lab.settings.config import TrainConfig
from gaf_lab.tasks.games import ACROBOT, CARTPOLE, Game, Games

EPISODES, TESTED = 50_000, 50
DISCOUNT = 0.99


def cartpole(config: TrainConfig) -> Problem:
    """Episodes of CartPole; the metric is an episode's return, 200 at most.

    `limit` in the config is the number of episodes. Actions are drawn in training; in an evaluation
    they are the likelier ones.
    """
    return play_episodes(config, CARTPOLE, "cartpole")


def acrobot(config: TrainConfig) -> Problem:
    """Episodes of Acrobot, as in `cartpole`; the return is -500 at least."""
    return play_episodes(config, ACROBOT, "acrobot")


def play_episodes(config: TrainConfig, game: Game, name: str) -> Problem:
    train, test = episodes(0, EPISODES, config), episodes(EPISODES, TESTED)
    return Problem(
        model=partial(PolicyGradient, game),
        train=(train, train[:, 1]),
        test=(test, test[:, 1]),
        clean=torch.ones(EPISODES, dtype=torch.int64),
        loss=surrogate_of,
        metric=Metric("return", return_of),
        classes=0,
        name=name,
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
    """A network with 32 hidden units that plays: episodes (b, 2) to losses and returns (b, 2)."""

    def __init__(self, game: Game, width: int = 32) -> None:
        super().__init__()
        self.game = game
        self.network = nn.Sequential(
            nn.Linear(game.seen, width), nn.Tanh(), nn.Linear(width, game.actions)
        )
        self.games: dict[int, Games] = {}

    def forward(self, x: Tensor) -> Tensor:
        states, actions, rewards, alive = (part.to(x.device) for part in self.play(x[:, 0]))
        log_p = self.network(states).log_softmax(2).gather(2, actions[..., None])[..., 0]
        sign = x[:, 1].to(log_p.dtype)
        advantage = advantages(rewards * sign[:, None], alive)
        losses = -(log_p * advantage).sum(1) * len(x) / alive.sum()
        return torch.stack([losses, rewards.sum(1)], 1)

    @torch.no_grad()
    def play(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Plays episodes: what the policy saw (b, t, s), its actions, the rewards, and where an
        episode was not over (1, else 0), each (b, t) and on the CPU.

        numbers: of the episodes (b,).
        """
        games, steps = self._games(len(numbers)), self.game.steps
        draws = [generator(0, "episode", number) for number in numbers.tolist()]
        start = torch.stack([torch.rand(4, generator=draw) for draw in draws])
        luck = torch.stack([torch.rand(steps, generator=draw) for draw in draws])
        seen = games.begin(((2 * start - 1) * self.game.start).double().numpy())
        alive, found = torch.ones(len(numbers)), []
        for t in range(steps):
            here = torch.from_numpy(seen)
            chances = self.network(here.to(numbers.device)).softmax(1).cpu()
            action = draw_actions(chances, luck[:, t]) if self.training else chances.argmax(1)
            seen, reward, over = games.step(action.numpy())
            found.append((here, action, alive * torch.from_numpy(reward).float(), alive))
            alive = alive * torch.from_numpy(~over)
            if not alive.any():
                break
        return tuple(torch.stack(part, 1) for part in zip(*found, strict=True))

    def _games(self, count: int) -> Games:
        """`count` games that step together."""
        if count not in self.games:
            self.games[count] = self.game.make(count)
        return self.games[count]


def draw_actions(chances: Tensor, luck: Tensor) -> Tensor:
    """Actions (b,) by their chances (b, a), from numbers (b,) that are uniform in [0, 1)."""
    or_later = chances.flip(1).cumsum(1).flip(1)[:, 1:]  # the chance of this action or a later one
    return (or_later > luck[:, None]).sum(1)


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
