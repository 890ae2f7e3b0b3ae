"""gaf bench train, gaf bench cpu: timed steps are gaf train's, and reports follow from the times.

The figures of docs/speed.md are those of the records. `python
tests/lab/bench/test_bench_train.py` prints the page's tables anew.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

import gaf
from gaf_lab.bench import cpu, crew
from gaf_lab.bench.cpu import SettingSpeed, advice, measure_settings, setting_cells, table
from gaf_lab.bench.cpu_settings import (
    BASE,
    Setting,
    all_settings,
    break_even,
    describe_choice,
    fastest,
)
from gaf_lab.bench.plain_loop import OnePicture, PlainLoop, fresh_model
from gaf_lab.bench.timing import StepTime, time_in_turn
from gaf_lab.bench.train import TIMED_ARMS, TrainSetup, take_training_steps
from gaf_lab.bench.train_results import (
    ALL,
    AVERAGING,
    BOOKS,
    DATA,
    PASSES,
    PLAIN_LOOP,
    REST,
    SAVING,
    ArmTime,
    PartTime,
)
from gaf_lab.commands import main as cli
from gaf_lab.data.augment import normalise
from gaf_lab.data.make_data import make_run_data
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.loop import Training
from gaf_lab.training.optimizers import make_optimizer
from gaf_lab.training.turns import run_to_end
from helpers.fakes import Silent

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SMALL = TrainConfig(
    dataset="digits",
    k=2,
    b=20,
    augment=True,
    passes=2.0,
    eval_every=2.0,
    nesterov=True,
    weight_decay=0.01,
    tau=2.0,
)


# --- tables of the page


def lines_of(name: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (ROOT / "benchmarks" / name).read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def between(line: dict[str, Any], name: str, form: str = ".2f", scale: float = 1.0) -> str:
    median, low, high = (
        format(scale * line[f"{name}_{at}"], form) for at in ("median", "p10", "p90")
    )
    return f"{median} ({low} to {high})"


def conditions() -> str:
    found = lines_of("train.jsonl", "conditions")[0]
    pictures = {"cifar100": "CIFAR-100", "noise": "White noise of CIFAR-100's shape"}[
        found["dataset"]
    ]
    machine = found["machine"]
    return (
        f"{pictures}; {found['model']}, stem {found['stem']}, k = {found['k']}, b = {found['b']}, "
        f"sampler {found['sampler']}; {machine['threads']} of {machine['cores']} cores, "
        f"load {found['load']:.0f}; {found['rounds']} rounds."
    )


def train_table() -> str:
    head = [
        "arm",
        "CPU ms",
        "over averaging (10% to 90%)",
        "the same in CPU time",
        "steps/s over the plain loop's (10% to 90%)",
        "taken",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines_of("train.jsonl", "bench-train"):
        ratios = " | ".join(
            [
                between(line, "ratio", ".3f"),
                between(line, "cpu_ratio", ".3f"),
                between(line, "times_plain"),
            ]
        )
        lines.append(
            f"| {line['arm']} | {line['cpu_ms_median']:.0f} | {ratios} "
            f"| {100 * line['stepped']:.0f}% |"
        )
    return "\n".join(lines)


def part_table() -> str:
    lines = [
        "| part | CPU ms a step | share, % (10% to 90%) | share in CPU time, % |",
        "|---|---|---|---|",
    ]
    for line in lines_of("train.jsonl", "bench-train-part"):
        shares = [between(line, name, scale=100) for name in ("share", "cpu_share")]
        lines.append(f"| {line['part']} | {line['cpu_ms_median']:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def cpu_table() -> str:
    head = [
        "model",
        "runs x threads",
        "channels-last",
        "compiled",
        "steps per second",
        "ratio (10% to 90%)",
        "start, s",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines_of("cpu.jsonl", "bench-cpu"):
        way = f"{line['processes']} x {line['threads']}" + (", spinning" if line["spin"] else "")
        layout = ["yes" if line[name] else "no" for name in ("channels_last", "compile")]
        found = [
            f"{line['steps_per_second']:.2f}",
            between(line, "ratio"),
            f"{line['start_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join([line['model'], way, *layout, *found])} |")
    return "\n".join(lines)


def choices() -> str:
    lines = lines_of("cpu.jsonl", "bench-cpu")
    models = list(dict.fromkeys(line["model"] for line in lines))
    return "\n".join(
        f"- {model}: {describe_choice([line for line in lines if line['model'] == model])}"
        for model in models
    )


@pytest.mark.parametrize("part", [conditions, train_table, part_table, cpu_table, choices])
def test_the_pages_figures_are_the_records(part):
    text = (ROOT / "docs" / "speed.md").read_text()
    assert " ".join(part().split()) in " ".join(text.split())  # lines may be broken anywhere


# --- what is timed


def test_each_begins_in_turn_and_the_first_round_is_not_counted():
    calls: list[tuple[str, int]] = []
    work = {name: lambda n, name=name: calls.append((name, n)) for name in "abc"}
    found = time_in_turn(work, rounds=3, block=5, device=CPU)
    assert [name for name, _ in calls] == [*"abc", *"bca", *"cab", *"abc"]
    assert {n for _, n in calls} == {5}
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("engine", ["plain", "device"])
def test_timed_steps_are_those_of_a_run(engine, tmp_path):
    config = dataclasses.replace(SMALL, engine=engine)
    timed, whole = Training(config, None), Training(config, None)
    take_training_steps(timed, Silent(), 3)  # type: ignore[arg-type]
    take_training_steps(timed, Silent(), 4)  # type: ignore[arg-type]
    run_to_end(whole.run(tmp_path, Silent(), steps=7, keep_checkpoints=False))
    assert timed.step == whole.step == 7
    for p, q in zip(timed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_plain_loop_transforms_like_a_shift_and_a_mirror_of_the_padded_picture():
    x = torch.randint(
        256, (2, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    data = OnePicture(x, torch.tensor([4, 6]), mean, std)
    padded = nn.functional.pad(x, (4,) * 4)
    cuts = [
        padded[1:, :, top : top + 9, left : left + 7]
        for top, left in itertools.product(range(9), repeat=2)
    ]
    possible = normalise(torch.cat([*cuts, *(c.flip(3) for c in cuts)]), mean, std)
    torch.manual_seed(0)
    seen = set()
    for _ in range(50):
        one, label = data[1]
        apart = (possible - one).abs().amax((1, 2, 3))
        assert apart.min() < 1e-5  # the same sum of the same numbers, in another order
        assert label == 6
        seen.add(int(apart.argmin()))
    assert len(seen) > 25
    assert {number // 81 for number in seen} == {0, 1}


def test_the_plain_loop_takes_the_steps_that_gaf_takes_on_the_same_micro_batches():
    problem = make_run_data(SMALL, None, CPU)
    loop = PlainLoop(SMALL, problem, CPU, workers=0)
    x, y = problem.inputs(problem.train.x[:80]), problem.train.observed[:80]  # type: ignore[index]
    loop.data = TensorDataset(x, y)  # type: ignore[assignment]
    parts = list(torch.arange(80).split(20))
    ours = iter([part.tolist() for part in parts])
    loop.draw = lambda: next(ours)  # type: ignore[method-assign]
    model = fresh_model(problem)
    accumulator = gaf.Accumulator(
        make_optimizer(SMALL, SMALL.lr, list(model.parameters())), gaf.GAF(2.0)
    )
    for pair in zip(parts[::2], parts[1::2], strict=True):
        loop.step()
        for part in pair:
            accumulator.backward(nn.functional.cross_entropy(model(x[part]), y[part]))
        accumulator.step()
    for p, q in zip(loop.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # a batch's mean is added up in another order


@pytest.mark.parametrize("sampler", ["iid", "stratified-clean"])
def test_the_plain_loop_draws_as_many_of_each_class_where_it_is_to(sampler):
    problem = make_run_data(dataclasses.replace(SMALL, sampler=sampler), None, CPU)
    loop = PlainLoop(problem.config, problem, CPU, workers=0)
    drawn = loop.draw()
    assert len(set(drawn)) == SMALL.b
    if sampler == "stratified-clean":
        assert torch.bincount(problem.train.clean[drawn]).tolist() == [2] * 10
    assert loop.draw() != drawn


# --- what is reported


def took(*walls: float) -> list[StepTime]:
    """Steps that computed for half of their time."""
    return [StepTime(wall, wall / 2) for wall in walls]


def test_lines_by_hand():
    arm = ArmTime(
        "GAF", took(10, 20, 30), averaging=took(10, 10, 10), plain=took(100, 100, 60), stepped=0.5
    ).line()
    assert (arm["ms_median"], arm["cpu_ms_median"], arm["steps_per_second"], arm["rounds"]) == (
        20,
        10,
        50,
        3,
    )
    assert (arm["ratio_median"], arm["cpu_ratio_median"], arm["times_plain_median"]) == (2, 2, 5)
    assert (arm["ratio_p10"], arm["times_plain_p10"], arm["times_plain_p90"]) == pytest.approx(
        (1.2, 2.6, 9.0)
    )
    part = PartTime(
        "data", [StepTime(1, 1), StepTime(2, 1), StepTime(3, 1)], whole=took(10, 10, 10)
    ).line()
    assert (part["ms_median"], part["share_median"], part["share_p90"]) == pytest.approx(
        (2, 0.2, 0.28)
    )
    assert part["cpu_share_median"] == pytest.approx(0.2)


def test_time_of_the_cpu_is_that_of_all_children_too():
    def work(count: int) -> None:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)

    alone, idle = (
        time_in_turn({"": w}, 1, 1, CPU)[""][0] for w in (work, lambda count: time.sleep(0.1))
    )
    assert idle.wall > 100 > idle.cpu
    assert alone.cpu > 20  # ten million additions


@pytest.fixture(params=["plain", "device"])
def benched(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict[str, Any]], str]:
    out = tmp_path / "new" / "train.jsonl"
    words = [
        "bench",
        "train",
        "--model",
        "mlp",
        "--sampler",
        "iid",
        "--b",
        "10",
        "--rounds",
        "2",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--engine", request.param, "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out


def test_a_run_writes_a_line_per_arm_and_part(benched):
    (conditions, *lines), shown = benched
    assert (conditions["dataset"], conditions["sampler"], conditions["k"], conditions["b"]) == (
        "noise",
        "iid",
        2,
        10,
    )
    arms = {line["arm"]: line for line in lines if line["kind"] == "bench-train"}
    parts = {line["part"]: line for line in lines if line["kind"] == "bench-train-part"}
    assert list(arms) == [*TIMED_ARMS, PLAIN_LOOP]
    assert list(parts) == [DATA, BOOKS, SAVING, PASSES, REST]
    assert arms[AVERAGING]["ratio_median"] == arms[PLAIN_LOOP]["times_plain_median"] == 1
    assert arms[AVERAGING]["stepped"] == arms[ALL]["stepped"] == 1
    for unit in ("ms_median", "cpu_ms_median"):
        inside = sum(parts[name][unit] for name in (DATA, BOOKS, PASSES, REST))
        # of two rounds the median is the mean, which adds up
        assert inside == pytest.approx(arms[ALL][unit])
    assert "white noise" in shown
    assert all(name in shown for name in (*arms, *parts))


def test_conditions_are_the_papers_but_for_what_is_given():
    config = TrainSetup(data_folder=Path("data"), rounds=3).config()
    assert (config.dataset, config.model, config.stem, config.augment) == (
        "cifar100",
        "resnet18",
        "imagenet",
        True,
    )
    assert (config.k, config.b, config.tau) == (2, 100, 0.97)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--rounds", "1"], "rounds must be at least 2"),
        (["train", "--workers", "-1"], "workers must be one number or more"),
        (["train", "--engine", "device", "--b", "7"], "b must be a multiple of the 100 classes"),
        (["cpu", "--rounds", "1"], "rounds must be at least 2"),
        (
            ["gpu"],
            "gaf bench accumulate, gaf bench ddp, gaf bench hsdp, gaf bench train, gaf bench cpu",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


# --- gaf bench cpu


def test_settings_by_hand():
    assert [(s.processes, s.threads) for s in all_settings(6)[:-1:4]] == [
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 6),
        (6, 1),
    ]
    assert all_settings(6)[-1] == Setting(1, 6, False, False, spin=True)
    assert [(s.channels_last, s.compile) for s in all_settings(1)] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert [s for s in all_settings(6) if not s.compile] == all_settings(6, compile=False)
    assert BASE in all_settings(6)


def test_threads_of_processes_started_meanwhile_sleep_or_do_what_they_do_unasked(monkeypatch):
    for before in ({}, {"OMP_WAIT_POLICY": "active"}):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        for name, value in before.items():
            monkeypatch.setenv(name, value)
        with crew.wait_policy(spin=False):
            assert os.environ["OMP_WAIT_POLICY"] == "passive"
        with crew.wait_policy(spin=True):
            assert "OMP_WAIT_POLICY" not in os.environ
        assert os.environ.get("OMP_WAIT_POLICY") == before.get("OMP_WAIT_POLICY")


class Simulated:
    """A crew without a compiler: channels-last halves its steps, more processes cost nothing."""

    def __init__(self, config: TrainConfig, cores: int) -> None:
        self.closed = False

    def steps(self, setting: Setting, steps: int) -> float | str:
        seconds = (
            0.5 if setting.spin else (0.05 if setting.channels_last else 0.1) / setting.threads**0.5
        )
        return "no g++" if setting.compile else steps * seconds

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[SettingSpeed]:
    monkeypatch.setattr(cpu, "Crew", Simulated)
    return measure_settings(["mlp"], rounds=3, cores=4)


def test_speeds_are_those_of_all_processes_and_ratios_are_to_one_thread(simulated):
    lines = {m.setting: m.line() for m in simulated}
    assert list(lines) == all_settings(4)
    assert lines[BASE]["steps_per_second"] == pytest.approx(10)
    assert lines[Setting(1, 4, True, False)]["steps_per_second"] == pytest.approx(40)
    assert lines[Setting(4, 1, True, False)]["steps_per_second"] == pytest.approx(80)
    assert lines[Setting(4, 1, True, False)]["ratio_median"] == pytest.approx(8)
    assert lines[Setting(1, 4, False, False, spin=True)]["ratio_median"] == pytest.approx(0.2)
    assert lines[BASE]["ratio_median"] == 1
    assert lines[Setting(1, 4, False, True)]["failed"] == "no g++"


def test_the_choice_is_the_fastest_and_what_failed_is_said(simulated):
    said = advice(simulated, "mlp")
    assert said == (
        "4 threads, channels-last: 40 steps/s; compiling failed; "
        "4 runs at once, one thread each: 2.00 times the steps of one"
    )
    rows = [setting_cells(m.line()) for m in simulated]
    assert sum("failed: no g++" in row for row in rows) == 8
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(simulated))
    assert "channels-last" in captured.get()


def row(
    last: bool, compiled: bool, speed: float, ratio: Sequence[float], start: float = 1.0
) -> dict[str, Any]:
    names = ("ratio_p10", "ratio_median", "ratio_p90")
    what = {"processes": 1, "threads": 1, "channels_last": last, "compile": compiled, "spin": False}
    return (
        what
        | {"steps_per_second": speed, "start_seconds": start}
        | dict(zip(names, ratio, strict=True))
    )


def test_a_gain_within_the_spread_is_none():
    plain = row(False, False, 10, (0.9, 1.0, 1.1))
    assert fastest([row(True, False, 11, (1.05, 1.08, 1.3)), plain], compiled=False) == plain
    assert fastest([plain, row(True, False, 12, (1.05, 1.2, 1.3))], compiled=False)["channels_last"]


def test_compiling_pays_once_the_steps_have_earned_its_start():
    eager, fast = (
        row(False, False, 10, (1, 1, 1), start=2),
        row(False, True, 20, (2, 2, 2), start=27),
    )
    assert break_even(eager, fast) == pytest.approx(500)  # 25 s at 0.05 s a step
    assert break_even(eager, eager) is None
    assert "compiling pays from 500 steps on" in describe_choice([eager, fast])
    assert "compiling was not measured" in describe_choice([eager])
    assert "compiling does not pay" in describe_choice(
        [eager, row(False, True, 9, (0.9, 0.9, 0.9))]
    )


class Pipe:
    def __init__(self, asked: list[Any]) -> None:
        self.asked, self.said = iter(asked), []  # type: ignore[var-annotated]

    def recv(self) -> Any:
        return next(self.asked)

    def send(self, said: Any) -> None:
        self.said.append(said)


def test_a_process_goes_on_after_a_setting_that_fails(monkeypatch):
    def build(config: TrainConfig, folder: Path | None) -> Training:
        if config.compile:
            raise RuntimeError("no compiler\nand a long trace")
        return Training(config, folder)

    monkeypatch.setattr(crew, "Training", build)
    pipe, threads = Pipe([(False, True, 1), (True, False, 2), None]), torch.get_num_threads()
    crew.serve_steps(pipe, threads, SMALL)
    assert pipe.said[0] == "RuntimeError: no compiler"
    assert pipe.said[1] > 0


@pytest.mark.slow
def test_processes_measure_every_setting():
    found = measure_settings(["mlp"], rounds=2, cores=2)
    assert [m.setting for m in found] == all_settings(2)
    assert all(m.failed is None and len(m.speeds) == 2 and min(m.speeds) > 0 for m in found)


if __name__ == "__main__":
    print(conditions(), train_table(), part_table(), cpu_table(), choices(), sep="\n\n")
