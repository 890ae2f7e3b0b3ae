"""gaf bench hsdp: a run of two processes end to end."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gaf_lab.bench import bytes_sent
from gaf_lab.bench.hsdp import HSDPCost, hsdp_table, measure_hsdp
from gaf_lab.bench.hsdp_ways import GATHER, HSDP, HSDP_WAYS, HSDPSetup
from gaf_lab.bench.timing import StepTime
from gaf_lab.commands import main as cli

SCALARS = 6 * 8 + 13 * 4  # K, the scaler's factor and a flag; which parameters were reached


def test_gaf_sends_what_plain_hsdp_sends_and_the_scalars() -> None:
    found = measure_hsdp(HSDPSetup("mlp", b=4, replicas=2, shards=1, rounds=2), memory=False)
    lines = {cost.way: cost.line() for cost in found}
    assert tuple(lines) == HSDP_WAYS
    size = lines[HSDP]["shard_bytes"]
    assert size == 4 * (3072 * 512 + 512 + 512 * 512 + 512 + 512 * 100 + 100)
    assert lines[HSDP]["ratio_median"] == 1
    for way, line in lines.items():
        assert line["ms_median"] > 0
        assert line["ratio_p10"] <= line["ratio_median"] <= line["ratio_p90"]
        assert line["extra_shards"] is None
        assert size <= line["sent_bytes"] <= size + (way not in (HSDP, GATHER)) * SCALARS


def test_a_table_shows_the_memory() -> None:
    times = [StepTime(3.0, 1.0), StepTime(4.0, 2.0)]
    plain = [StepTime(2.0, 1.0), StepTime(2.0, 1.0)]
    cost = HSDPCost(HSDP, HSDPSetup(), 100, times, plain, plain, {"isend": 10.0}, 350, 200)
    line = cost.line()
    assert (line["ratio_median"], line["cpu_ratio_median"], line["of_late_median"]) == (
        1.75,
        1.5,
        1.75,
    )
    assert cost.line()["extra_shards"] == 1.5
    assert hsdp_table([cost]).row_count == 1


def test_only_the_groups_calls_are_counted(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group, other = dist.new_group([0]), dist.new_group([0])
        with bytes_sent.counting(4, group) as sent:  # as if there were 4
            dist.all_reduce(torch.ones(10), group=group)
            dist.all_reduce(torch.ones(10), group=other)
            dist.all_reduce(torch.ones(10))
        assert sent == {"all_reduce": 60}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "1"], "replicas must be at least 2"),
        (["--shards", "0"], "shards must be at least 1"),
        (["--rounds", "1"], "rounds must be at least 2"),
        (["--b", "1"], "b must be at least 2"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "hsdp", *words]) == 2
    assert message in capsys.readouterr().err
