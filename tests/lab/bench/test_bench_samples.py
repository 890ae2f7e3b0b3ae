"""gaf bench samples: the ways that are timed give one Gram matrix."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gaf_lab.bench import samples, samples_step, samples_ways
from gaf_lab.bench.samples_models import sample_problem
from gaf_lab.commands.main import run_command


@pytest.mark.parametrize("name", ["resnet18", "transformer"])
def test_the_ways_give_the_same(name: str) -> None:
    model, x, y = sample_problem(name, 3)
    ways = samples_ways.ways_to_gram(model)
    want = ways[samples_ways.PER_SAMPLE](model, x, y)
    found = ways[samples_ways.GHOST](model, x, y)
    assert isinstance(want, torch.Tensor) and isinstance(found, torch.Tensor)
    # float32 gradients of two programs
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * want.diagonal().max().item())


def test_the_record_has_a_line_for_each_way(tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    words = "--parts gram --models transformer --n 3 2 --rounds 2 --out"
    assert run_command(["bench", "samples", *words.split(), str(out)], Console(quiet=True)) == 0
    _, *lines = map(json.loads, out.read_text().splitlines())
    assert {line["n"] for line in lines} == {2, 3}
    ghost, rows = (
        next(line for line in lines if line["n"] == 3 and line["way"] == way)
        for way in (samples_ways.GHOST, samples_ways.PER_SAMPLE)
    )
    assert ghost["rounds"] == 2 and ghost["ms_median"] > 0
    assert 0 < ghost["peak_mib"] < rows["peak_mib"]
    assert rows["per_sample_gradients_mib"] < rows["peak_mib"]


def test_ways_that_were_too_slow_are_left_out_at_larger_n() -> None:
    found = samples.measure_samples(("transformer",), (3, 2), 2, longest=0.0)
    assert {cost.way for cost in found if cost.n == 3} == {samples.PLAIN_BACKWARD}
    assert len({cost.way for cost in found if cost.n == 2}) >= 3


def test_a_step_of_each_score_is_compared_with_plain_training(tmp_path: Path) -> None:
    out = tmp_path / "steps.jsonl"
    words = "--parts step --b 2 --block 1 --rounds 2 --out"
    assert run_command(["bench", "samples", *words.split(), str(out)], Console(quiet=True)) == 0
    _, *lines = map(json.loads, out.read_text().splitlines())
    assert [line["score"] for line in lines] == [*samples_step.AGREEMENT_SCORES]
    assert all(0 < line["ratio_p10"] <= line["ratio_median"] for line in lines)


@pytest.mark.parametrize("score", samples_step.AGREEMENT_SCORES)
def test_the_steps_train_and_judge(score: str) -> None:
    """With the same weights as plain training, because no sample is weighed on its first visits."""
    model, plain = (samples_step.ResNetStep(name, 2) for name in (score, "plain"))
    for one in (model, plain):
        one.take(2)
    for p, q in zip(model.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert model.agreement is not None and int(model.agreement.steps) == 2


def test_no_number_of_samples_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "samples", "--n", "0"], Console()) == 2
    assert "n must be at least 1; got 0" in capsys.readouterr().err
