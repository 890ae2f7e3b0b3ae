"""The number that a task's runs are judged by, as it stands in their records."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """What the evaluations of a run measure.

    Attributes:
        name: "accuracy", "loss", or what the task calls it.
        key: evaluations have it under "test_" and "heldout_" and this key.
        higher: whether higher is better.
        share: whether it lies in [0, 1] and is shown in percent.
    """

    name: str = "accuracy"
    key: str = "accuracy"
    higher: bool = True
    share: bool = True

    def of(self, line: dict[str, Any], part: str = "test") -> float | None:
        """The score in an evaluation, of the part "test" or "heldout"; None without one."""
        value = line.get(f"{part}_{self.key}")
        return None if value is None else float(value)

    def rank(self, value: float) -> float:
        """A number that is higher for a better score."""
        return value if self.higher else -value

    def text(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f}%" if self.share else f"{value:.4g}"


ACCURACY, LOSS = Score(), Score("loss", "loss", higher=False, share=False)


def score_in(header: dict[str, Any]) -> Score:
    """The score of a run by its header. Older records have none: theirs is the accuracy."""
    return Score(**header["score"]) if header.get("score") else ACCURACY
