"""What `gaf.SampleAgreement` adds to a training step: each score beside plain training, in turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import gaf
from gaf_lab.bench.timing import StepTime, compare_steps, time_in_turn
from gaf_lab.progress import Tell, silent
from gaf_lab.training.models import make_model
from gaf_lab.training.weighing import last_linear

PLAIN_TRAINING, ALL_LAYERS = "plain", "vote of all layers"
AGREEMENT_SCORES = ("prototype", "loss", "vote", ALL_LAYERS)
CLASSES, SAMPLES = 100, 50_000  # of CIFAR-100


@dataclass(frozen=True)
class AgreementCost:
    """Steps with one score, and those of plain training in the same rounds."""

    score: str
    b: int
    block: int  # steps between two looks at the clock
    times: list[StepTime]
    plain_times: list[StepTime]

    def line(self) -> dict[str, Any]:
        return {
            "kind": "bench-agreement",
            "model": "resnet18",
            "score": self.score,
            "b": self.b,
            "rounds": len(self.times),
            "block": self.block,
            **compare_steps("ratio", self.times, self.plain_times),
        }


def measure_agreement(b: int, rounds: int, block: int, tell: Tell = silent) -> list[AgreementCost]:
    """Steps of ResNet18 on pictures of 32 x 32, with the ImageNet stem.

    Args:
        b: samples of a step.
        rounds: how many, after one that is not counted.
        block: steps of each in a round.
        tell: is called with the progress.
    """
    work = {name: ResNetStep(name, b).take for name in (PLAIN_TRAINING, *AGREEMENT_SCORES)}
    tell(f"steps, b = {b}", 0, 1)
    times = time_in_turn(work, rounds, block, torch.device("cpu"))
    plain = times[PLAIN_TRAINING]
    return [AgreementCost(name, b, block, times[name], plain) for name in AGREEMENT_SCORES]


class ResNetStep:
    """Training of ResNet18 on one batch: forward, loss, backward, SGD.

    Args:
        score: of the criterion; "plain" for the mean loss.
        b: samples.
    """

    def __init__(self, score: str, b: int) -> None:
        torch.manual_seed(0)
        self.model = make_model("resnet18", (3, 32, 32), CLASSES, "imagenet")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = torch.randn(b, 3, 32, 32), torch.randint(CLASSES, (b,))
        self.index, self.plain = torch.arange(b), nn.CrossEntropyLoss()
        self.agreement = None if score == PLAIN_TRAINING else make_agreement(score, self.model)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.loss(self.model(self.x)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss(self, outputs: Tensor) -> Tensor:
        if self.agreement is None:
            return self.plain(outputs, self.y)  # type: ignore[no-any-return]
        return self.agreement(outputs, self.y, self.index)  # type: ignore[no-any-return]


def make_agreement(score: str, model: nn.Module) -> gaf.SampleAgreement:
    head, losses = last_linear(model), nn.CrossEntropyLoss(reduction="none")
    if score == ALL_LAYERS:
        return gaf.SampleAgreement(losses, head, "vote", model=model, num_samples=SAMPLES)
    given: Any = score
    return gaf.SampleAgreement(losses, head, given, num_samples=SAMPLES)


def agreement_table(found: Sequence[AgreementCost]) -> Table:
    result = Table(title="A step with gaf.SampleAgreement", box=box.SIMPLE_HEAD)
    for column in ("score", "ms", "ratio", "10%", "90%", "CPU ratio"):
        result.add_column(column, justify="left" if column == "score" else "right", no_wrap=True)
    for line in (cost.line() for cost in found):
        ratios = [line[name] for name in ("ratio_median", "ratio_p10", "ratio_p90")]
        cells = [f"{value:.3f}" for value in (*ratios, line["cpu_ratio_median"])]
        result.add_row(line["score"], f"{line['ms_median']:.0f}", *cells)
    result.caption = "ratio to plain training in the same round: median, 10% and 90%"
    return result
