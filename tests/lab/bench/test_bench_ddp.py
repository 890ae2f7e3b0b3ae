"""gaf bench ddp: formulas by hand, and a run of two processes end to end."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import gaf.ranks.messages
from gaf_lab.bench import bytes_sent, cost_model, predictions
from gaf_lab.bench.cost_model import Network
from gaf_lab.bench.ddp import measure_ddp
from gaf_lab.bench.ddp_rank import DDPSetup
from gaf_lab.bench.ways import GAF, GUARD, MEASURED, MEASURED_EVERY, NAIVE, PLAIN, WAYS, filter_rows
from gaf_lab.commands import main as cli
from helpers.warm import WARM

SLOW_NETWORK = Path(__file__).parents[3] / "benchmarks" / "slow_network.py"
FIELDS = {
    "kind",
    "way",
    "k",
    "rounds",
    "gradient_bytes",
    "ms_median",
    "ratio_median",
    "ratio_p10",
    "ratio_p90",
    "alone_ms_median",
    "alone_ratio_median",
    "alone_ratio_p10",
    "alone_ratio_p90",
    "sent_bytes",
    "sent",
    "wire_bytes",
    "peak_mib",
    "extra_gradients",
}


# --- bytes


def test_what_a_rank_sends_by_hand():
    assert bytes_sent.ring_all_reduce(100, 4) == 150  # 3 quarters to reduce, 3 to hand round
    assert bytes_sent.all_to_all(100, 4) == 75
    assert bytes_sent.all_gather(100, 4) == 300
    assert bytes_sent.broadcast(100, 4) == 75
    assert bytes_sent.ring_all_reduce(100, 2) == 100


@pytest.mark.parametrize("k", [2, 3, 8, 1000])
def test_all_to_all_in_and_all_gather_out_are_one_all_reduce(k):
    # in slices, either way
    way_out = (bytes_sent.all_gather(7e6 / k, k), k * bytes_sent.broadcast(7e6 / k, k))
    for out in way_out:
        assert bytes_sent.all_to_all(7e6, k) + out == pytest.approx(
            bytes_sent.ring_all_reduce(7e6, k), rel=1e-12
        )


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_calls_are_counted_and_still_do_their_work():
    before = dist.broadcast
    with bytes_sent.counting(4) as sent:  # as if there were 4
        t, whole = torch.ones(10), torch.zeros(10, dtype=torch.float64)
        dist.all_reduce(t)
        dist.broadcast(t, 0)
        dist.all_to_all_single(torch.empty(10), t)
        dist.all_gather([torch.empty(10)], t)
        gaf.ranks.messages._all_gather(whole, torch.ones(10, dtype=torch.float64))
    assert sent == {
        "all_reduce": 60,
        "broadcast": 30,
        "all_to_all_single": 30,
        "all_gather": 120 + 240,
    }
    assert whole.tolist() == [1] * 10
    assert dist.broadcast is before


def test_the_naive_way_averages_what_it_accepts():
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.6]), torch.tensor([-1.0, 0.0])]
    assert filter_rows(rows, tau=0.5).tolist() == pytest.approx([0.9, 0.3])  # as in the README
    assert filter_rows(rows).tolist() == pytest.approx([0.8 / 3, 0.2])


# --- end to end


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("bench") / "new" / "ddp.jsonl"
    words = ("-m", "gaf_lab", "bench", "ddp", "--model", "mlp", "--b", 4, "--k", 2, "--rounds", 2)
    program = WARM.start_program(*words, "--out", out, out=out.parents[1] / "said")
    said = program.finish()
    assert program.returncode == 0, said
    return out, said


def test_a_run_writes_a_whole_line_per_way(measured):
    conditions, *lines = map(json.loads, measured[0].read_text().splitlines())
    assert (
        conditions["parameters"]
        == lines[0]["gradient_bytes"] / 4
        == 3072 * 512 + 512 + 512 * 512 + 512 + 512 * 100 + 100
    )
    assert conditions["rounds"] == 2
    assert [line["way"] for line in lines] == list(WAYS)
    for line in lines:
        assert set(line) == FIELDS
        assert line["ratio_p10"] <= line["ratio_median"] <= line["ratio_p90"]
        assert line["ms_median"] > 0
        assert line["alone_ms_median"] > 0
    assert lines[0]["ratio_median"] == lines[0]["alone_ratio_median"] == 1
    assert all(way in measured[1] for way in WAYS)


def test_gaf_sends_what_an_all_reduce_sends_and_the_scalars(measured):
    lines = [json.loads(line) for line in measured[0].read_text().splitlines()[1:]]
    plain, ours, naive = ({line["way"]: line for line in lines}[way] for way in (PLAIN, GAF, NAIVE))
    size = plain["gradient_bytes"]
    scalars = cost_model.scalar_bytes(2, 2)
    assert scalars == 6 * 8  # K, the scaler's factor, and a flag
    assert plain["sent_bytes"] == bytes_sent.ring_all_reduce(size, 2)
    assert ours["sent_bytes"] <= 1.01 * plain["sent_bytes"] + scalars
    # a piece of leftovers is filled up to a whole slice
    assert ours["sent_bytes"] == pytest.approx(cost_model.gaf_bytes(2, size), abs=8)
    assert naive["sent_bytes"] == size


def test_sums_are_a_plain_all_reduce_and_2_k_numbers(measured):
    lines = [json.loads(line) for line in measured[0].read_text().splitlines()[1:]]
    sent = {line["way"]: line["sent_bytes"] for line in lines}
    scalars = bytes_sent.all_gather(8 * (2 * 2 + 2), 2)
    assert sent[GUARD] == pytest.approx(sent[PLAIN] + scalars, abs=1e-6)
    assert sent[MEASURED] == pytest.approx(sent[PLAIN] + scalars / MEASURED_EVERY, abs=1e-6)


def test_the_models_figures_stand_beside_measured_ones(measured, capsys, monkeypatch):
    monkeypatch.setattr(cli, "Console", lambda **kw: Console(width=100, **kw))
    assert cli.main(["bench", "ddp", "--against", str(measured[0])]) == 0
    shown = capsys.readouterr().out
    assert "fitted to the file's plain DDP" in shown
    assert PLAIN in shown
    assert NAIVE not in shown


def test_a_file_without_points_is_refused(tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text('{"kind": "conditions"}\n')
    assert cli.main(["bench", "ddp", "--against", str(path)]) == 2
    assert "must hold lines of gaf bench ddp; it has none" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("options", "ks", "message"),
    [
        ({"rounds": 1}, (2,), "rounds: must be at least 2, for a spread; got 1. Give --rounds 20."),
        ({"b": 1}, (2,), "b: must be at least 2, for BatchNorm; got 1. Give --b 32."),
        ({}, (4, 1), "k: must be at least 2 processes; got 4, 1. Give --k 2 4."),
    ],
)
def test_what_cannot_be_measured_is_refused(options, ks, message):
    with pytest.raises(ValueError, match=message):
        measure_ddp(DDPSetup(**options), ks)


# --- the cost model


def test_predicted_by_hand():
    network = Network(alpha=1e-3, beta=1e6, memory=1e7)  # 1 ms, 1 MB/s, 10 MB/s
    assert cost_model.plain_seconds(4, 4e6, network) == pytest.approx(0.006 + 6)
    cost = cost_model.gaf_seconds(4, 4e6, network)
    assert cost.way_in == cost.way_out == pytest.approx(0.003 + 3)
    assert cost.scalars == pytest.approx(0.003 + 3 * 18 * 8 / 1e6)
    assert cost.gram == pytest.approx(10 * 2 * 1e6 / 1e7)  # 10 pairs of slices of 1 MB
    assert cost.total() == pytest.approx(cost.way_in + cost.scalars + cost.gram + cost.way_out)


def test_two_ranks_reduce_the_sum_and_take_two_inner_products():
    network = Network(1e-3, 1e6, 1e7, flops=1e8)
    cost = cost_model.gaf_seconds(2, 4e6, network)
    assert cost.way_in == cost_model.plain_seconds(2, 4e6, network) == pytest.approx(0.002 + 4)
    assert cost.way_out == 0
    assert cost.gram == pytest.approx(0.8)
    assert cost_model.gaf_seconds(4, 4e6, network, micro_group=2).way_out == pytest.approx(
        0.003 + 3
    )  # two rows of four ranks go the general way


def test_a_product_reads_once_and_multiplies_all_with_all():
    network = Network(1e-3, 1e6, 1e7, flops=1e8)
    assert cost_model.gram_seconds(4, 1e6, network) == pytest.approx(0.4 + 2 * 16 * 250_000 / 1e8)


def test_scalars_are_gathered_among_few_and_added_up_in_blocks_among_many():
    assert cost_model.scalar_bytes(32, 32) == 31 * (32 * 32 + 2) * 8
    assert cost_model.scalar_bytes(64, 64) == pytest.approx(2 * (64 * 64 + 2) * 8 * 63 / 64)
    assert cost_model.scalar_bytes(64, 2) == pytest.approx(2 * 6 * 8 * 63 / 64)
    network = Network(1.0, math.inf, math.inf)
    assert [cost_model.gaf_seconds(k, 1.0, network).scalars for k in (32, 33)] == [31, 64]


def test_micro_groups_leave_at_most_32_rows():
    assert [cost_model.micro_group_for(k) for k in (2, 32, 64, 4096)] == [1, 1, 2, 128]
    network = Network(0, 1e9, 1e10)
    plain, alone, grouped = (cost_model.gaf_seconds(4096, 1e6, network, m) for m in (1, 1, 128))
    assert plain == alone
    assert grouped.way_in == alone.way_in
    assert grouped.scalars < alone.scalars / 10_000
    assert grouped.gram < alone.gram / 10_000


def test_the_bandwidth_is_what_makes_plain_all_reduces_come_out_right():
    network = Network(1e-4, 5e8, 1e10)
    points = [
        {
            "way": way,
            "k": k,
            "gradient_bytes": 1e8,
            "alone_ms_median": 1000 * cost_model.plain_seconds(k, 1e8, network),
        }
        for k in (2, 4, 8)
        for way in (PLAIN, GAF)
    ]
    assert predictions.fitted_beta(points, 1e-4) == pytest.approx(5e8)


def test_predict_prints_every_k_in_80_columns(capsys, monkeypatch):
    monkeypatch.setattr(cli, "Console", lambda **kw: Console(width=80, **kw))
    assert cli.main(["bench", "ddp", "--predict"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {k} " in shown for k in predictions.KS)
    assert "…" not in shown


# --- a slow network


def test_without_its_tools_the_slow_network_says_why():
    done = subprocess.run(
        [sys.executable, str(SLOW_NETWORK)],
        env=os.environ | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 77
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("slow_network: the ")
    assert " must " in done.stderr


def slow_network() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slow_network", SLOW_NETWORK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_network_that_cannot_be_made_is_removed_and_says_why(monkeypatch):
    slow, called = slow_network(), []

    def refuse(command, **kw):
        called.append(command)
        code = 2 if "tbf" in command else 0
        return subprocess.CompletedProcess(
            command, code, "", "Error: Specified qdisc kind is unknown.\n"
        )

    monkeypatch.setattr(slow.subprocess, "run", refuse)
    with (
        pytest.raises(
            slow.NotHere,
            match="must allow `.*tbf.*`; it reports: Error: Specified qdisc kind is unknown. Use",
        ),
        slow.network(2, 100),
    ):
        pass
    removed = [" ".join(command[1:3]) for command in called[-5:]]
    # each host's cable and namespace; the bridge
    assert removed == ["link del", "netns del", "link del", "netns del", "link del"]


def test_a_users_other_system_or_name_is_told(monkeypatch):
    slow = slow_network()
    monkeypatch.setattr(slow.sys, "platform", "darwin")
    with pytest.raises(slow.NotHere, match="the system must be Linux"):
        slow.check_machine()
    monkeypatch.setattr(slow.sys, "platform", "linux")
    monkeypatch.setattr(slow.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(slow.os, "geteuid", lambda: 1000)
    with pytest.raises(slow.NotHere, match="the user must be root"):
        slow.check_machine()
