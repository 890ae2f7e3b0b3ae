"""gaf bench guard: rows are autograd's, faults do what their names say, alarms are counted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from gaf_lab.bench import guard_runs
from gaf_lab.bench.fleet import MOMENTUM, Fleet
from gaf_lab.bench.guard import GuardLengths, measure_false_alarms, measure_faults, network_of
from gaf_lab.bench.guard_faults import CLEAN, FAULTS, ROW_FAULTS, flip_bit
from gaf_lab.bench.guard_results import detection_cell
from gaf_lab.bench.guard_tasks import GuardTask, load_guard_tasks, mean_loss
from gaf_lab.commands.main import main

RNG = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def tasks() -> dict[str, GuardTask]:
    return {task.name: task for task in load_guard_tasks(8)}


@pytest.mark.parametrize("name", ["digits", "mnist5k", "transformer"])
def test_a_fleet_trains_as_networks_one_by_one(tasks: dict[str, GuardTask], name: str) -> None:
    task = tasks[name]
    networks = [network_of(task, seed) for seed in range(2)]
    fleet = Fleet([network_of(task, seed) for seed in range(2)], task.rate)
    optimizers = [SGD(net.parameters(), task.rate, momentum=MOMENTUM) for net in networks]
    for step in range(3):
        chosen = torch.randint(len(task.train[1]), (2, 3, task.b))
        x, y = (part[chosen] for part in task.train)
        rows = fleet.rows(fleet.weights[:, None].repeat(1, 3, 1), x, y)
        moves = torch.tensor([True, step != 1])
        for i, net in enumerate(networks):
            for j in range(3):
                grads = torch.autograd.grad(mean_loss(net(x[i, j]), y[i, j]), [*net.parameters()])
                want = torch.cat([g.flatten() for g in grads])
                # float32, in another order
                torch.testing.assert_close(rows[i, j], want, rtol=1e-4, atol=1e-6)
            optimizers[i].zero_grad()
            mean_loss(net(x[i].flatten(0, 1)), y[i].flatten(0, 1)).backward()
            if moves[i]:
                optimizers[i].step()
        fleet.step(rows.mean(1), moves)
        found = [nn.utils.parameters_to_vector(net.parameters()) for net in networks]
        torch.testing.assert_close(fleet.weights, torch.stack(found).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lowest", "highest"), [(0, 22), (23, 30)])
def test_one_bit_of_one_coordinate_flips(lowest: int, highest: int) -> None:
    for _ in range(100):
        row = torch.randn(50)
        after = row.clone()
        flip_bit(lowest, highest)(after, RNG)
        (place,) = (row.view(torch.int32) != after.view(torch.int32)).nonzero().flatten().tolist()
        change = int(row.view(torch.int32)[place]) ^ int(after.view(torch.int32)[place])
        assert change.bit_count() == 1
        assert lowest <= change.bit_length() - 1 <= highest


@pytest.mark.parametrize(
    ("fault", "holds"),
    [
        ("NaN", lambda row, after: after.isnan().sum() == 1),
        ("infinite", lambda row, after: after.isinf().sum() == 1),
        ("1000 times", lambda row, after: torch.equal(after, 1000 * row)),
        ("sign flipped", lambda row, after: torch.equal(after, -row)),
    ],
)
def test_a_fault_does_what_its_name_says(fault: str, holds: Callable[..., bool]) -> None:
    row = torch.randn(50)
    after = row.clone()
    ROW_FAULTS[fault](after, RNG)
    assert holds(row, after)


def test_runs_part_at_the_fault_and_alarms_are_of_its_worker(tasks: dict[str, GuardTask]) -> None:
    lengths = GuardLengths(before=30, after=5)
    found = {one.fault: one for one in measure_faults(tasks["digits"], 4, 2, lengths)}
    assert tuple(found) == FAULTS
    clean = found[CLEAN]
    assert clean.delays == [None, None]
    assert clean.accuracy["Guard"] == pytest.approx(clean.accuracy["Mean"], abs=0.01)
    for fault in ("NaN", "infinite", "1000 times"):
        one = found[fault]
        assert (one.delays, one.wrong) == ([1, 1], 0)
        assert all(
            one.loss["Guard"][i] == pytest.approx(clean.loss["Guard"][i], rel=0.2) for i in (0, 1)
        )
    assert found["NaN"].kinds == ["not finite"] * 2
    assert found["1000 times"].kinds == ["norm"] * 2
    assert found["NaN"].loss["Mean"] == [None, None]
    line = json.loads(json.dumps(found["NaN"].line(), allow_nan=False))
    assert line["kind"] == "bench-guard"
    assert line["loss"].keys() == guard_runs.GUARDED_WAYS.keys()


def test_clean_steps_are_counted_over_all_runs(tasks: dict[str, GuardTask]) -> None:
    clean = measure_false_alarms(tasks["transformer"], 2, GuardLengths(clean=40))
    assert (clean.steps, clean.alarms) == (40, [])


@pytest.mark.parametrize(
    ("delays", "cell"),
    [([1, 3, 20], "3 of 3: 3 (20)"), ([None, 4], "1 of 2: 4 (4)"), ([None], "0 of 1")],
)
def test_a_cell_of_the_table(delays: list[int | None], cell: str) -> None:
    assert detection_cell(delays) == cell


def test_the_command_writes_a_line_for_each_fault(tmp_path: Path) -> None:
    out = tmp_path / "guard.jsonl"
    words = ["--k", "2", "--seeds", "1", "--before", "2", "--after", "2", "--clean", "4"]
    assert main(["bench", "guard", *words, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines].count("bench-guard") == 3 * len(FAULTS)
    assert [line["kind"] for line in lines].count("bench-guard-clean") == 3
    assert (lines[0]["seeds"], lines[0]["after"]) == (1, 2)


@pytest.mark.parametrize("words", [["--k", "1"], ["--seeds", "0"], ["--after", "0"]])
def test_sizes_out_of_range_are_refused(words: list[str]) -> None:
    assert main(["bench", "guard", *words]) != 0
