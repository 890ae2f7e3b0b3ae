"""How long a sweep still takes: what its runs should cost, corrected by what they have taken."""

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from gaf_lab.settings.config import TrainConfig

ENOUGH_SHARE = 0.05  # share of a run that shows its speed


@dataclass(frozen=True)
class Expected:
    """What a run should cost, in any unit. Runs of one kind take the same time for a unit."""

    kind: Hashable
    cost: float


@dataclass
class Watched:
    """What has been seen of a run: times by the clock, shares of the run in [0, 1]."""

    started: float
    warm: bool  # whether another run had finished by then, so that data and workers were ready
    shares: list[tuple[float, float]] = field(default_factory=list)  # first and last: time, share


class TimeLeft:
    """Seconds until all runs are finished.

    A run takes its cost times a factor: the seconds per cost of the finished runs of its kind, or
    of those in progress, or else of all runs. A run in progress has a factor once it has shown
    ENOUGH_SHARE. Runs keep the plan's order, as many at a time as were seen at a time.

    Args:
        expected: every run of the plan, by name, in its order.
        clock: seconds; tests give their own.
    """

    def __init__(
        self, expected: Mapping[str, Expected], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.expected, self.clock = expected, clock
        self.watched: dict[str, Watched] = {}  # runs in progress
        self.seconds: dict[str, float] = {}  # finished runs; what each took
        self.over: set[str] = set()  # finished or failed
        self.at_once = 1

    def start(self, name: str) -> None:
        self.watched[name] = Watched(self.clock(), warm=bool(self.seconds))

    def progress(self, name: str, share: float) -> None:
        run = self.watched.get(name)
        if run is None:
            return
        run.shares = [*run.shares[:1], (self.clock(), share)]
        moving = sum(bool(other.shares) for other in self.watched.values())
        self.at_once = max(self.at_once, moving)

    def finish(self, name: str, seconds: float) -> None:
        """seconds: in training and evaluation. A warm run's start is added to them."""
        run = self.watched.pop(name, None)
        if run is not None and run.warm and run.shares and run.shares[0][1] < ENOUGH_SHARE:
            seconds = max(seconds, self.clock() - run.started)
        self.seconds[name] = seconds
        self.over.add(name)

    def fail(self, name: str) -> None:
        self.watched.pop(name, None)
        self.over.add(name)

    def left(self) -> float | None:
        """Seconds until the last run ends; None before any run has shown its speed."""
        factors = self.factors()
        if not factors:
            return None
        free = [self.rest(name, run, factors) for name, run in self.watched.items()]
        free += [0.0] * (self.at_once - len(free))
        heapq.heapify(free)
        for name in self.expected:
            if name not in self.watched and name not in self.over:
                heapq.heappush(free, heapq.heappop(free) + self.run_seconds(name, factors))
        return max(free)

    def rest(self, name: str, run: Watched, factors: Mapping[Hashable, float]) -> float:
        """Seconds until a run in progress ends."""
        whole = self.observed_seconds(run) or self.run_seconds(name, factors)
        if not run.shares:
            return whole
        last, share = run.shares[-1]
        return max(0.0, (1 - share) * whole - (self.clock() - last))

    def run_seconds(self, name: str, factors: Mapping[Hashable, float]) -> float:
        """Seconds of a whole run."""
        expected = self.expected[name]
        return expected.cost * factors.get(expected.kind, factors[None])

    def factors(self) -> dict[Hashable, float]:
        """Seconds per cost by kind, and under None those of all runs; empty if none is known."""
        known = self.seconds_by_kind(self.seconds)
        running = {name: self.observed_seconds(run) for name, run in self.watched.items()}
        shown = {name: seconds for name, seconds in running.items() if seconds is not None}
        known = self.seconds_by_kind(shown) | known
        if known:
            seconds, costs = zip(*known.values(), strict=True)
            known[None] = sum(seconds), sum(costs)
        return {kind: seconds / cost for kind, (seconds, cost) in known.items()}

    def seconds_by_kind(self, runs: Mapping[str, float]) -> dict[Hashable, tuple[float, float]]:
        """Seconds and costs of the runs, added up by kind."""
        sums: dict[Hashable, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for name, seconds in runs.items():
            kind, cost = self.expected[name].kind, self.expected[name].cost
            sums[kind] = sums[kind][0] + seconds, sums[kind][1] + cost
        return dict(sums)

    def observed_seconds(self, run: Watched) -> float | None:
        """Seconds of a whole run at its speed so far; None if it has not shown ENOUGH_SHARE."""
        if len(run.shares) < 2:
            return None
        (begun, first), (last, share) = run.shares
        return (last - begun) / (share - first) if share - first >= ENOUGH_SHARE else None


def run_kind(config: TrainConfig) -> Hashable:
    """What the time of a sample depends on, as far as the config shows it."""
    network = (config.model, config.stem, config.dataset, config.task, config.size, config.autocast)
    return (*network, config.b, config.device, config.loss, config.sam > 0)
