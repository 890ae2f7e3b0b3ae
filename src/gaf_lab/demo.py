"""The main job in a minute: label noise on MNIST-5k; averaging, GAF, and the control that has GAF's steps and batch sizes.

Two processes with one thread each: the network is small, and a second thread would not make it faster.
"""

import dataclasses
import multiprocessing
import os
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.managers import DictProxy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import gaf
from gaf_lab import records
from gaf_lab.config import TrainConfig
from gaf_lab.console import percent, progress
from gaf_lab.presets import DEMO
from gaf_lab.problem import Problem
from gaf_lab.train import train


def arms(seed: int, folder: Path, base: TrainConfig) -> dict[str, tuple[TrainConfig, str | None]]:
    """Runs of one seed: name -> config, and the name of the run that must be finished before."""
    seeded = dataclasses.replace(base, seed=seed)
    subset = dataclasses.replace(seeded, policy="random-subset", replay=folder / f"gaf-{seed}")
    return {
        f"gaf-{seed}": (seeded, None),
        f"averaging-{seed}": (dataclasses.replace(seeded, policy="mean"), None),
        f"random-subset-{seed}": (subset, f"gaf-{seed}"),
    }


class SharedProgress:
    """Reports a run to the process that shows the bars."""

    def __init__(self, name: str, board: "DictProxy[str, Any]") -> None:
        self.name, self.board, self.facts, self.told = name, board, "", 0.0

    def begin(self, problem: Problem, step: int, steps: int) -> None:
        self.steps = steps

    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        if time.perf_counter() - self.told > 0.2 or step == self.steps:
            self.told = time.perf_counter()
            self.board[self.name] = (step, self.steps, self.facts)

    def evaluated(self, line: dict[str, Any]) -> None:
        self.facts = f"test {percent(line['test_accuracy'])}, memorised {percent(line['memorised'])}"


def work(name: str, config: TrainConfig, folder: Path, board: "DictProxy[str, Any]", command: str) -> str:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    train(config, folder / name, SharedProgress(name, board), keep_checkpoints=False, command=command)
    return name


def demo(folder: Path, console: Console, seeds: int = 3, base: TrainConfig = DEMO, workers: int | None = None) -> list[records.Run]:
    """Runs all arms for all seeds and returns what is finished; Ctrl-C stops early and keeps that."""
    plan = {name: job for seed in range(seeds) for name, job in arms(seed, folder, base).items()}
    command = f"gaf demo --seeds {seeds} --passes {base.passes:g} --out {folder}"
    workers = workers or min(2, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context) as pool:
        board = manager.dict()
        try:
            follow(plan, folder, pool, board, command, console)
        except KeyboardInterrupt:
            console.print("\nStopped. What is finished is kept.")
            for process in list(getattr(pool, "_processes", {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
    found = [records.read(folder / name) for name in plan if (folder / name / records.FILE).is_file()]
    return [run for run in found if run.end is not None and run.end["status"] == "finished"]


def follow(
    plan: dict[str, tuple[TrainConfig, str | None]],
    folder: Path,
    pool: ProcessPoolExecutor,
    board: "DictProxy[str, Any]",
    command: str,
    console: Console,
) -> None:
    """Starts every run as soon as the one that it waits for is finished, and draws the bars."""
    waiting, running, done = dict(plan), set[Future[str]](), set[str]()
    with progress(console) as bars:
        whole = bars.add_task("all runs", total=100 * len(plan), facts="")
        tasks = {name: bars.add_task(name, total=None, start=False, visible=False, facts="") for name in plan}
        shown: dict[str, int] = defaultdict(int)
        while waiting or running:
            for name, (config, after) in list(waiting.items()):
                if after is None or after in done:
                    running.add(pool.submit(work, name, config, folder, board, command))
                    del waiting[name]
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            done |= {future.result() for future in finished}
            for name, (step, steps, facts) in dict(board).items():
                if not bars.tasks[tasks[name]].started:
                    bars.start_task(tasks[name])
                bars.update(tasks[name], completed=step, total=steps, visible=True, facts=facts)
                shown[name] = 100 * step // steps
            bars.update(whole, completed=sum(shown.values()), facts=f"{len(done)} of {len(plan)} finished")
