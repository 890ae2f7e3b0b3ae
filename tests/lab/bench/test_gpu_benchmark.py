"""benchmarks/gpu.py, for a machine with a GPU: a rehearsal on the CPU runs what needs no CUDA."""

import importlib.util
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.warm import WARM

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CONDITIONS = {"device", "torch", "python", "date", "commit", "cuda", "nccl", "driver"}

# what torch itself needs, and this repository
NEEDED = [
    "torch",
    "torchgen",
    "functorch",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "filelock",
    "fsspec",
    "jinja2",
    "markupsafe",
]
HIDING = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def found(name, path=None, target=None):
    spec = find(name, path, target)
    places = "" if spec is None else f"{{spec.origin}} {{spec.submodule_search_locations}}"
    return None if "site-packages" in places and name.split(".")[0] not in {needed} else spec
PathFinder.find_spec = found
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(gpu, path, *words):
    """The exit status and the lines of a rehearsal."""
    status = gpu.main(["--device", "cpu", "--rounds", "2", "--out", str(path), *words])
    return status, [json.loads(line) for line in path.read_text().splitlines()]


def hide(monkeypatch, folder, *needed):
    """Processes that are started find no packages but these."""
    (folder / "sitecustomize.py").write_text(HIDING.format(needed={*NEEDED, *needed}))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_with_torch_and_numpy_alone(gpu, tmp_path, monkeypatch):
    hide(monkeypatch, tmp_path, "numpy")
    check_every_part(gpu, tmp_path / "lines")


def test_a_rehearsal_runs_every_part(gpu, tmp_path, monkeypatch):
    def lines_of_fork(part, device, rounds):
        """The lines, without the seconds of imports of a new process."""
        words = (BENCHMARKS / "gpu.py", "--part", part, "--rounds", rounds, "--device", "cpu")
        program = WARM.start_program(*words, out=tmp_path / part)
        said = program.finish()
        assert program.returncode == 0, said
        yield from (
            {"part": part, **json.loads(line)}
            for line in said.splitlines()
            if line.startswith('{"kind":')
        )
        yield {"kind": "part", "part": part, "name": f"{part} ended", "seconds": 0.0}

    monkeypatch.setattr(gpu, "lines_of", lines_of_fork)
    check_every_part(gpu, tmp_path / "lines")


def check_every_part(gpu, path):
    status, lines = lines_of(gpu, path)
    failed = [line for line in lines if line.get("ok", True) is False]
    assert failed == [] and status == 0
    assert [line["part"] for line in lines if line["kind"] == "part"] == list(gpu.PARTS)
    assert all(line.keys() >= CONDITIONS for line in lines)
    assert {line["torch"] for line in lines} == {torch.__version__}

    checks = [line for line in lines if line["kind"] == "check"]
    skipped = [line["name"] for line in checks if line["ok"] is None]
    assert skipped and all("wait" in name for name in skipped)
    assert all(line.keys() >= {"name", "ok", "value", "expected", "tolerance"} for line in checks)
    assert len({line["name"] for line in checks}) == len(checks)

    ratios = [line for line in lines if line["kind"] == "ratio"]
    assert {line["part"] for line in ratios} == {part for part in gpu.PARTS if "ratios" in part}
    for line in ratios:
        assert line["rounds"] == 2 and line["ms_median"] > 0 < line["plain_ms_median"]
        assert 0 < line["ratio_p10"] <= line["ratio_median"] <= line["ratio_p90"]


def test_numpy_may_be_missing_too(gpu, tmp_path, monkeypatch):
    hide(monkeypatch, tmp_path)
    status, lines = lines_of(gpu, tmp_path / "lines", "--parts", "one rank", "ratios of engine")
    assert [line for line in lines if line.get("ok", True) is False] == [] and status == 0


def test_all_parts_together_take_less_than_six_minutes(gpu):
    assert sum(seconds for _, _, seconds, _ in gpu.PARTS.values()) <= 340


def test_a_part_that_hangs_or_breaks_costs_itself_alone(gpu, tmp_path, monkeypatch, capsys):
    module, function, *_ = gpu.PARTS["scaler"]
    parts = {"hangs": (module, function, 0.01, 0), "scaler": gpu.PARTS["scaler"]}
    # a part that its own process does not know of ends with an error
    monkeypatch.setattr(gpu, "PARTS", {"breaks": (module, function, 60, 0)} | parts)
    status, lines = lines_of(gpu, tmp_path / "lines", "--parts", "breaks", "hangs", "scaler")
    first, second, *others = lines
    assert (first["name"], first["ok"], first["value"]) == ("breaks ends", False, "exit status 2")
    assert "invalid choice: 'breaks'" in first["trace"]
    assert (second["name"], second["ok"], second["value"]) == (
        "hangs ends",
        False,
        "stopped after 0 s",
    )
    assert status == 1 and {line["part"] for line in others} == {"scaler"} and len(others) > 10
    assert all(line["ok"] for line in others if line["kind"] == "check")
    assert "2 failed: breaks ends; hangs ends." in capsys.readouterr().out


def test_a_check_that_is_off_or_breaks_fails_and_the_others_go_on(gpu):
    from gpu_parts.common import lines

    def look():
        yield "near", 1.001, 1.0, 0.01
        yield "far", 1.1, 1.0, 0.01
        yield "no number", math.nan, 1.0, 0.01
        yield "list", [True, False], [True, True], 0.0
        yield "count", True, 1, 0.0
        raise ZeroDivisionError("at last")

    found = list(lines("one", look))
    assert [line["ok"] for line in found] == [True, False, False, False, True, False]
    assert found[-1]["value"] == "ZeroDivisionError: at last"
    assert json.loads(json.dumps(found[2], allow_nan=False))["value"] == "nan"


def test_the_checks_see_a_wrong_decision_a_wrong_update_and_a_moved_weight(gpu, monkeypatch):
    from gpu_parts import device
    from gpu_parts.common import Options, lines

    def failing(look):
        return {line["name"] for line in lines("x", look) if not line["ok"]}

    cpu, policy = torch.device("cpu"), device.gaf.GAF(device.TAU)
    look = partial(device.same_as_reference, cpu, policy, "contiguous", torch.float32)
    assert failing(look) == set()
    monkeypatch.setattr(device.gaf.Accumulator, "decide", careless(device.gaf.Accumulator.decide))
    assert failing(look) == {"x: update, relative error"}
    other = device.gaf.GAF(2.0)
    aggregate = device.gaf.aggregate
    monkeypatch.setattr(device.gaf, "aggregate", lambda rows, _: aggregate(rows, other))
    assert failing(look) >= {"x: distances", "x: accepted"}
    monkeypatch.undo()

    options = Options(cpu, 1.0, 2, small=True)
    assert failing(partial(device.skip, options)) == set()
    monkeypatch.setattr(device.gaf.Accumulator, "step", restless(device.gaf.Accumulator.step))
    assert failing(partial(device.skip, options)) == {"x: tensors changed"}


def careless(decide):
    """One coordinate of the update is off by a thousandth of its length."""

    def wrong(acc):
        decision = decide(acc)
        grads = [p.grad for group in acc.optimizers[0].param_groups for p in group["params"]]
        grads[0].view(-1)[0] += 1e-3 * torch.cat([g.view(-1) for g in grads]).norm()
        return decision

    return wrong


def restless(step):
    """A weight moves whatever was decided."""

    def wrong(acc):
        decision = step(acc)
        acc.optimizers[0].param_groups[0]["params"][0].data.view(-1)[0] += 1
        return decision

    return wrong
