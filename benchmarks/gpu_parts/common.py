"""Lines of a result, and what the parts share.

The parts share a small network, its batches, and the rows that autograd alone gives.
"""

import contextlib
import json
import math
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Line = dict[str, Any]
Batch = tuple[Tensor, Tensor]
Found = Iterator[tuple[str, Any, Any, float]]  # what, value, expected, tolerance
Step = Callable[[], object]

ROOT = Path(__file__).parents[2]
K, BATCH, CLASSES = 8, 32, 10
TAU = 0.9  # of the small network's rows some are accepted, some are not
EXACT = 0.0
FLOAT32 = 1e-5  # relative: sums of some thousand products in another order
HALF = 0.02  # relative: bfloat16 has 8 bits, and a row's coordinates are rounded apart
NEEDS_CUDA = "not measured: needs CUDA"


@dataclass(frozen=True)
class Options:
    """How a part is run.

    Attributes:
        seconds: that a part of ratios may spend on its rounds.
        rounds: at most.
        small: for a rehearsal: the least that runs every line.
    """

    device: torch.device
    seconds: float
    rounds: int
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def lines(name: str, look: Callable[[], Found]) -> Iterator[Line]:
    """A line for each value that was found; one that fails where the look breaks off."""
    try:
        for what, value, expected, tolerance in look():
            ok = None if value == NEEDS_CUDA else close(value, expected, tolerance)
            seen = str(value) if value in (math.inf, -math.inf) or value != value else value
            yield {
                "kind": "check",
                "name": f"{name}: {what}",
                "ok": ok,
                "value": seen,
                "expected": expected,
                "tolerance": tolerance,
            }
    except Exception as error:
        yield failed(name, f"{type(error).__name__}: {error}", traceback.format_exc())


def failed(name: str, value: str, trace: str = "") -> Line:
    return {
        "kind": "check",
        "name": name,
        "ok": False,
        "value": value[-1000:],
        "expected": "no exception",
        "tolerance": 0.0,
        "trace": trace.replace(f"{ROOT}/", "")[-2000:],
    }


def emit(line: Line) -> None:
    """To the process that reads this one's standard output."""
    print(json.dumps(line), flush=True)


def close(value: Any, expected: Any, tolerance: float) -> bool:
    """NaN is close to nothing."""
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return abs(float(value) - float(expected)) <= tolerance
    return bool(value == expected)


# --- the small network


class Network(nn.Module):
    """Convolutions, a scalar and an empty parameter; pictures (b, 3, 12, 12)."""

    def __init__(self, layout: str = "contiguous") -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device("cpu"):  # the same weights wherever they go
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, stride=2)
            self.last = nn.Linear(16 * 4 * 4, CLASSES)
            self.scale, self.empty = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0))
        if layout == "channels last":
            self.to(memory_format=torch.channels_last)
        if layout == "transposed":
            self.last.weight = nn.Parameter(self.last.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu().flatten(1)
        return self.last(hidden) * self.scale + self.empty.sum()


def batches(count: int, device: torch.device, dtype: torch.dtype, size: int = BATCH) -> list[Batch]:
    """Micro-batches, a third of their labels noise."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 3, 12, 12, generator=rng, device="cpu")
    noise = torch.rand(count * size, generator=rng, device="cpu") < 1 / 3
    labels = torch.randint(CLASSES, (count * size,), generator=rng, device="cpu")
    y = torch.where(noise, labels, x[:, 0, 0, :CLASSES].argmax(1))
    return list(zip(x.to(device, dtype).split(size), y.to(device).split(size), strict=True))


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]).float(), batch[1])


def row_of(model: nn.Module, batch: Batch) -> Tensor:
    """(n,) float64 on the CPU, by torch.autograd.grad, in the order of each parameter's indices."""
    grads = torch.autograd.grad(mean_loss(model, batch), list(model.parameters()))
    return torch.cat([g.reshape(-1).double().cpu() for g in grads])


def rows_of(model: nn.Module, given: Sequence[Batch]) -> Tensor:
    """(k, n)"""
    return torch.stack([row_of(model, batch) for batch in given])


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors if t is not None])


def weights(model: nn.Module) -> Tensor:
    return flat([full(p) for p in model.parameters()])


def full(p: Tensor) -> Tensor:
    """Of a sharded parameter, all of it."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[no-any-return]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    """How many of these are other bits now."""
    return sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) + abs(
        len(before) - len(after)
    )


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the weights and of the optimizer's state."""
    moments = [v for state in optimizer.state.values() for v in state.values()]
    held = [*model.parameters(), *(m for m in moments if isinstance(m, Tensor))]
    return [full(t.detach()).clone() for t in held]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# --- waiting for the device


@contextlib.contextmanager
def no_wait(options: Options) -> Iterator[None]:
    """A call that waits for the device raises; where torch notices it, which is not everywhere."""
    if not options.cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(options: Options, step: Step) -> int | str:
    """How many calls of a step wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if options.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if options.cuda:
                torch.cuda.set_sync_debug_mode("default")
    if not options.cuda:
        return NEEDS_CUDA
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


# --- ratios


def ratios(
    options: Options,
    subject: str,
    plain: str,
    ways: dict[str, Step],
    go_on: Callable[[bool], bool] = bool,
) -> Iterator[Line]:
    """A line for each way: its time over the plain way's in the same round.

    Args:
        options: how many rounds at most, and how long.
        subject: what the names of the lines begin with.
        plain: the name of the way that the others are compared with.
        ways: by name, a step of each, warm.
        go_on: makes all ranks go on as long as each other.
    """
    began, times = time.perf_counter(), {name: list[float]() for name in ways}
    names = list(ways)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(milliseconds(options, ways[name]))
        in_time = number < 2 or time.perf_counter() - began < options.seconds
        if not go_on(in_time):
            break
    for name in names:
        if name != plain:
            yield ratio_line(f"{subject}: {name}", times[name], times[plain])


def milliseconds(options: Options, step: Step) -> float:
    options.wait()
    started = time.perf_counter()
    step()
    options.wait()
    return 1000 * (time.perf_counter() - started)


def ratio_line(name: str, ours: list[float], plain: list[float]) -> Line:
    found = [a / b for a, b in zip(ours, plain, strict=True)]
    low, *_, high = (
        statistics.quantiles(found, n=10, method="inclusive") if len(found) > 1 else found * 2
    )
    return {
        "kind": "ratio",
        "name": name,
        "rounds": len(found),
        "ms_median": statistics.median(ours),
        "plain_ms_median": statistics.median(plain),
        "ratio_median": statistics.median(found),
        "ratio_p10": low,
        "ratio_p90": high,
    }


def silence() -> None:
    """One row, and a tau that accepts everything, are what is wanted here."""
    warnings.filterwarnings("ignore", message="gaf:")
