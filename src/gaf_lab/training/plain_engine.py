"""Steps taken one by one: the engine "plain".

The k micro-gradients go to an accumulator, which decides.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gaf
from gaf_lab.data.run_data import RunData
from gaf_lab.training.objective import Forward, Objective
from gaf_lab.training.over_ranks import OverRanks
from gaf_lab.training.techniques import sam_perturbation
from gaf_lab.training.turns import Turns


class GradientSource(Protocol):
    """Brings the micro-gradients of each step to a decision.

    Attributes:
        turns: steps of the run that the last `micro_gradients` covered.
        averages: whether a step updates the average of the weights too.
    """

    turns: int
    averages: bool

    def ready(self, step: int, last: int, rates: Callable[[int], list[float]]) -> Turns[None]:
        """Makes step `step` ready, and gives way to other runs while the device is at work.

        Args:
            step: the next step.
            last: the run ends before this one.
            rates: the next learning rates, as many as it is called with.
        """
        ...

    def micro_gradients(self, step: int) -> Tensor:
        """Makes the micro-gradients of a step ready for the decision; returns their losses (k,)."""
        ...

    def forget(self, optimizer: Optimizer) -> None:
        """Makes the run's optimizer as new, and the next step that of a changed objective."""
        ...


class OneByOne:
    """Computes the micro-gradients of each step as it comes, in turn.

    Args:
        problem, model, objective: of the run.
        forward: the model as it is called: compiled, or over ranks.
        accumulator: takes the micro-gradients and decides.
        micro_batches: the micro-batches that this process computes.
    """

    averages = False

    def __init__(
        self,
        problem: RunData,
        model: nn.Module,
        objective: Objective,
        forward: Forward,
        accumulator: gaf.Accumulator | OverRanks,
        micro_batches: Iterable[int],
    ) -> None:
        self.problem, self.model, self.objective = problem, model, objective
        self.forward, self.accumulator = forward, accumulator
        self.micro_batches = micro_batches
        self.turns = 1

    def ready(self, step: int, last: int, rates: Callable[[int], list[float]]) -> Turns[None]:
        """Nothing is made ahead."""
        yield from ()

    def forget(self, optimizer: Optimizer) -> None:
        optimizer.state.clear()

    def micro_gradients(self, step: int) -> Tensor:
        return torch.stack([self.micro_gradient(step, i) for i in self.micro_batches])

    def micro_gradient(self, step: int, i: int) -> Tensor:
        """Passes the gradient of micro-batch i to the accumulator; returns its loss ()."""
        config = self.problem.config
        x, y = self.problem.micro_batch(step, i)
        index = self.problem.index(step, i)

        def compute_loss() -> Tensor:
            with torch.autocast(
                self.problem.device.type, torch.bfloat16, config.autocast == "bfloat16"
            ):
                return self.objective(self.forward, x, y, index, step, i)

        loss = compute_loss()
        if config.sam:
            with sam_perturbation(self.model, loss, config.sam):
                self.accumulator.backward(compute_loss())
        else:
            self.accumulator.backward(loss)
        return loss.detach()


class UntilEnough(OneByOne):
    """Steps of the run are micro-batches; the optimizer's average as many as the accumulator asks.

    One that is due by then ends at an evaluation and at the end of the run, so that a checkpoint
    holds no micro-gradients.
    """

    last: int | None = None

    def ready(self, step: int, last: int, rates: Callable[[int], list[float]]) -> Turns[None]:
        self.last = last
        yield from ()

    def micro_gradients(self, step: int) -> Tensor:
        losses: list[Tensor] = []
        assert isinstance(self.accumulator, gaf.Accumulator)
        while not losses or not (self.accumulator.enough or self.ends(step + len(losses))):
            losses.append(self.micro_gradient(step + len(losses), 0))
        self.turns = len(losses)
        return torch.stack(losses)

    def ends(self, step: int) -> bool:
        """Whether an evaluation follows after so many steps."""
        last = self.problem.steps if self.last is None else self.last
        return self.problem.evaluation(step) is not None or step >= last
