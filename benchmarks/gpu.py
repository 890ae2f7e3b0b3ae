"""The device engine on a CUDA GPU: is it right, how long does a step take, and how many runs fit beside each other?

    python benchmarks/gpu.py --out benchmarks/gpu.jsonl                  # from a checkout; needs torch, numpy, and nothing else
    python benchmarks/gpu.py --data DIR --stem cifar --k 4 --b 100 --autocast bfloat16 --out FILE

First the checks: the engine's decisions are those of gaf.Accumulator on the same device, a step makes no call that waits, runs that
share the device are what they are alone. Then times, as milliseconds per step and run: averaging and GAF, on the plain path and on
the engine, one run and several at once. Blocks of steps of all ways take turns; medians, and ratios to averaging on the plain path
in the same round. Without --data, pictures are white noise in CIFAR's shape. On a CPU the engine is run without a capture.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
# downloads, progress bars, JPEGs
for name in ("pooch", "requests", "rich", "rich.console", "rich.progress", "PIL", "PIL.Image"):
    whole = name.split(".")[0]
    if isinstance(sys.modules.get(whole), MagicMock) or importlib.util.find_spec(whole) is None:
        sys.modules[name] = MagicMock()

import torch  # noqa: E402

import gaf  # noqa: E402
from gaf_lab import environment  # noqa: E402
from gaf_lab.config import TrainConfig  # noqa: E402
from gaf_lab.engine import OnDevice  # noqa: E402
from gaf_lab.together import Place, train_together  # noqa: E402
from gaf_lab.train import Training, train  # noqa: E402

Line = dict[str, Any]
POLICIES: dict[str, Line] = {
    "averaging": {"policy": "mean"},
    "GAF, all accepted": {"tau": 2.0},  # the most work
    "GAF, start best": {"tau": 2.0, "start": "best"},
}
CHECKED: dict[str, Line] = {
    "GAF": {},
    "GAF, start best": {"start": "best"},
    "GAF, start worst": {"start": "worst"},
    "GAF, halving": {"average": "halving", "schedule": "cosine", "schedule_waits": True},
    "averaging": {"policy": "mean", "schedule": "cosine"},
    "random skip": {"policy": "random-skip"},
    "AdamW": {"optimizer": "adamw", "lr": 0.001},
    "bfloat16": {"autocast": "bfloat16"},
    "channels last": {"channels_last": True},
    "augmentation": {"augment": True},
}
PICTURES = "noise"  # of CIFAR's shape, made anew
# of distances: float32 rounding over some tens of steps, and convolutions that a library may choose anew
CLOSE = 1e-3


def main(words: list[str] | None = None) -> int:
    options = parsed(words)
    device = torch.device(
        "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    )
    if device.type == "cpu":
        print("No CUDA device is used: the engine is run as it is, without a capture.")
    torch.backends.cudnn.deterministic = True  # for the checks
    found = [said(line) for line in checks(options, device)]
    torch.backends.cudnn.deterministic = False
    found += [said(line) for line in times(options, device)]
    if options.out is not None:
        conditions = {
            "kind": "conditions",
            **vars(options),
            "versions": environment.versions(),
            "machine": environment.machine(device),
        }
        with options.out.open("a") as file:
            for line in [conditions | {"commit": environment.commit()}, *found]:
                file.write(json.dumps(line, default=str) + "\n")
    failed = [line["what"] for line in found if not line.get("ok", True)]
    print(f"Failed: {', '.join(failed)}." if failed else "Every check passed.")
    return 1 if failed else 0


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of CIFAR-100's archive")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--stem", default="imagenet", choices=["imagenet", "cifar"])
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--b", type=int, default=100)
    parser.add_argument("--autocast", default="none", choices=["none", "bfloat16"])
    parser.add_argument(
        "--runs", type=int, nargs="+", default=[1, 2, 4, 8], help="at the same time"
    )
    parser.add_argument(
        "--block", type=int, default=32, help="steps between two looks at the clock, at most 64"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=10_000, help="training pictures")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu"])
    parser.add_argument("--out", type=Path, help="lines are added to it")
    return parser.parse_args(words)


def said(line: Line) -> Line:
    if line["kind"] == "check":
        print(
            f"{'ok    ' if line['ok'] else 'FAILED'}  {line['what']:<46} {line['seen']}", flush=True
        )
    else:
        ratio = f"{line['ratio_median']:.3f}"
        print(f"{line['what']:<22} {line['engine']:<7} {line['runs']:>2} runs {line['ms_median']:>9.2f} ms {ratio:>7} of plain averaging",
              flush=True)  # fmt: skip
    return line


# Is it right?


def small(options: argparse.Namespace, device: torch.device, **changes: Any) -> TrainConfig:
    """Some tens of steps of a small network."""
    dataset: Any = PICTURES if options.data is None else "cifar100"
    base = TrainConfig(
        dataset=dataset,
        limit=400,
        model="convnet",
        k=4,
        b=20,
        passes=4.0,
        eval_every=2.0,
        lr=0.02,
        tau=0.9,
        nesterov=True,
        probe=100,
    )
    return dataclasses.replace(base, device=device.type, **changes)


def checks(options: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    for what, changes in CHECKED.items():
        yield check(
            f"decides as the plain path: {what}",
            lambda changes=changes: same_decisions(options, device, changes),
        )  # type: ignore[misc]
    if device.type == "cuda":
        yield check("a step makes no call that waits", lambda: no_call_waits(options, device))
    yield check(
        "runs side by side are what they are alone", lambda: same_side_by_side(options, device)
    )


def check(what: str, look: Callable[[], tuple[bool, str]]) -> Line:
    try:
        ok, seen = look()
    except Exception as error:
        ok, seen = False, f"{type(error).__name__}: {error}"
    return {"kind": "check", "what": what, "ok": ok, "seen": seen}


class Keeps:
    """Keeps every outcome of a run."""

    def __init__(self) -> None:
        self.outcomes: list[gaf.Outcome] = []

    def begin(self, problem: Any, step: int, steps: int) -> None: ...
    def evaluated(self, line: Line) -> None: ...
    def stepped(self, step: int, outcome: gaf.Outcome) -> None:
        self.outcomes.append(outcome)


def outcomes(options: argparse.Namespace, config: TrainConfig) -> list[gaf.Outcome]:
    keeps = Keeps()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", keeps, data_folder=options.data, keep_checkpoints=False)
    return keeps.outcomes


def same_decisions(
    options: argparse.Namespace, device: torch.device, changes: Line
) -> tuple[bool, str]:
    plain, ours = (
        outcomes(options, small(options, device, engine=engine, **changes))
        for engine in ("plain", "device")
    )
    apart = next(
        (
            step
            for step, (a, b) in enumerate(zip(plain, ours, strict=True))
            if a.accepted != b.accepted
        ),
        None,
    )
    furthest = max(
        distance_between(a, b) for a, b in itertools.islice(zip(plain, ours, strict=True), apart)
    )
    taken = sum(a.stepped for a in ours)
    seen = f"{len(ours)} steps, {taken} taken; distances differ by {furthest:.1e}"
    seen += (
        ""
        if apart is None
        else f"; decisions part at step {apart}: {plain[apart].distances} and {ours[apart].distances}"
    )
    return apart is None and furthest < CLOSE and taken > 0, seen


def distance_between(a: gaf.Outcome, b: gaf.Outcome) -> float:
    return max(abs(x - y) for x, y in zip(a.distances, b.distances, strict=True))


def no_call_waits(options: argparse.Namespace, device: torch.device) -> tuple[bool, str]:
    accumulator = Training(
        small(options, device, engine="device", augment=True), options.data
    ).accumulator
    assert isinstance(accumulator, OnDevice)
    accumulator.one.warm_up()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulator.one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, "torch.cuda.set_sync_debug_mode('error')"


def same_side_by_side(options: argparse.Namespace, device: torch.device) -> tuple[bool, str]:
    configs = [small(options, device, engine="device", seed=seed) for seed in range(4)]
    alone = [[o.accepted for o in outcomes(options, config)] for config in configs]
    keeps = [Keeps() for _ in configs]
    with tempfile.TemporaryDirectory() as folder:
        ended = train_together(
            configs, [Path(folder) / str(c.seed) for c in configs], keeps, data_folder=options.data
        )
    errors = [one for one in ended if isinstance(one, Exception)]
    if errors:
        raise errors[0]
    return [[o.accepted for o in one.outcomes] for one in keeps] == alone, f"{len(configs)} runs"


# How long does it take?


class Runs:
    """Some runs of one config, each in its own place, that take a block of steps together."""

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        engine: str,
        count: int,
        changes: Line,
    ) -> None:
        self.block, self.device = options.block, device
        shared = {
            name: getattr(options, name)
            for name in ("model", "stem", "k", "b", "autocast", "limit")
        }
        dataset: Any = PICTURES if options.data is None else "cifar100"
        config = TrainConfig(
            dataset=dataset, engine=engine, device=device.type, augment=True, passes=1000.0, lr=0.01, nesterov=True, weight_decay=5e-4,
            **shared, **changes,
        )  # type: ignore[arg-type]  # fmt: skip
        self.places = [Place() for _ in range(count)]
        self.trainings = []
        for seed, place in enumerate(self.places):
            with place.taken():
                self.trainings.append(
                    Training(dataclasses.replace(config, seed=seed), options.data)
                )

    def milliseconds(self) -> float:
        """Of one step of one run."""
        wait(self.device)
        started = time.perf_counter()
        for training, place in zip(self.trainings, self.places, strict=True):
            if isinstance(training.accumulator, OnDevice):
                with place.taken():
                    training.accumulator.launch(
                        range(training.step, training.step + self.block), [0.01] * self.block
                    )
        for training, place in zip(self.trainings, self.places, strict=True):
            with place.taken():
                if isinstance(training.accumulator, OnDevice):
                    training.accumulator.fetch()
                for _ in range(self.block):
                    training.macro_batch()
        wait(self.device)
        return 1000 * (time.perf_counter() - started) / (self.block * len(self.trainings))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(options: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Each way beside averaging on the plain path, a block of each in turn; the first round is not counted."""
    ways = [(what, "plain", 1) for what in POLICIES] + [
        (what, "device", count) for count in options.runs for what in POLICIES
    ]
    base = Runs(options, device, "plain", 1, POLICIES["averaging"])
    for what, engine, count in ways:
        try:
            runs = Runs(options, device, engine, count, POLICIES[what])
            rounds = [
                (base.milliseconds(), runs.milliseconds()) for _ in range(options.rounds + 1)
            ][1:]
        except torch.OutOfMemoryError:
            print(f"{what}, {count} runs: out of memory")
            continue
        memory = (
            {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if device.type == "cuda" else {}
        )
        yield {"kind": "time", "what": what, "engine": engine, "runs": count, "ms": [ours for _, ours in rounds],
               "ms_median": statistics.median(ours for _, ours in rounds), "plain_averaging_ms": [plain for plain, _ in rounds],
               "ratio_median": statistics.median(ours / plain for plain, ours in rounds)} | memory  # fmt: skip
        del runs
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
