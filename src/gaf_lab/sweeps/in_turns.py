"""A sweep's runs in this one process, in turns: for a GPU that one small network does not fill."""

from collections import deque
from collections.abc import Iterator
from functools import partial

from gaf_lab.sweeps.jobs import Job, JobEnd, JobProgress
from gaf_lab.sweeps.worker import Reporter, work_in_turns
from gaf_lab.training.run_context import RunContext
from gaf_lab.training.turns import Turns


class InTurns:
    """At most `workers` runs at a time, each on its own CUDA stream (`training.together`)."""

    def __init__(self, workers: int) -> None:
        self.limit = workers
        self.runs: dict[str, tuple[Turns[JobEnd], RunContext]] = {}
        self.news: deque[tuple[str, JobProgress | JobEnd]] = deque()

    def room(self) -> int:
        return self.limit - len(self.runs)

    def start(self, job: Job) -> None:
        reporter = Reporter(partial(self._queue, job.name))
        self.runs[job.name] = work_in_turns(job, reporter), RunContext()

    def _queue(self, name: str, event: JobProgress | JobEnd) -> None:
        self.news.append((name, event))

    def events(self, seconds: float) -> Iterator[tuple[str, JobProgress | JobEnd]]:
        """Gives each run a turn, however long it takes: this process has nothing else to do."""
        for name, (run, place) in list(self.runs.items()):
            with place.enter():
                try:
                    next(run)
                except StopIteration as end:
                    del self.runs[name]
                    self._queue(name, end.value)
        while self.news:
            yield self.news.popleft()

    def close(self) -> None:
        """Closes the records of the runs in progress; those with a checkpoint can be resumed."""
        for run, _ in self.runs.values():
            run.close()
