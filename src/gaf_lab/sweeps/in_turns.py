"""A sweep's runs in this one process, where they take turns: for a GPU, which one small network does not fill."""

from collections import deque
from collections.abc import Iterator
from functools import partial

from gaf_lab.sweeps.processes import Teller
from gaf_lab.sweeps.sweep import Ended, Job, Told, working
from gaf_lab.training.run import Turns
from gaf_lab.training.together import Place


class InTurns:
    """At most `workers` runs side by side, each on a CUDA stream of its own (`gaf_lab.training.together`)."""

    def __init__(self, workers: int) -> None:
        self.limit = workers
        self.runs: dict[str, tuple[Turns[Ended], Place]] = {}
        self.news: deque[tuple[str, Told | Ended]] = deque()

    def room(self) -> int:
        return self.limit - len(self.runs)

    def start(self, job: Job) -> None:
        self.runs[job.name] = working(job, Teller(partial(self._tell, job.name))), Place()

    def _tell(self, name: str, told: Told) -> None:
        self.news.append((name, told))

    def events(self, seconds: float) -> Iterator[tuple[str, Told | Ended]]:
        """Gives each run a turn; however long that takes, for there is nothing else to do in this process."""
        for name, (run, place) in list(self.runs.items()):
            with place.taken():
                try:
                    next(run)
                except StopIteration as end:
                    del self.runs[name]
                    self.news.append((name, end.value))
        while self.news:
            yield self.news.popleft()

    def close(self) -> None:
        """Runs under way close their records; with a checkpoint they go on when they are started again."""
        for run, _ in self.runs.values():
            run.close()
