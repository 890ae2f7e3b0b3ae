"""A run on several ranks: `torchrun --nproc-per-node K -m gaf_lab train ...` computes one of the K micro-batches on each.

The ranks talk over two groups: over gloo about numbers, errors and whose turn it is, and, on CUDA, over NCCL about
gradients. A rank that waits for another one's evaluation or download so keeps no accelerator's collective waiting.
"""

import contextlib
import hashlib
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import gaf
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig

T = TypeVar("T")

# for rank 0's downloads and evaluations; a rank that dies is noticed at once
PATIENCE = timedelta(hours=2)
FAREWELL = timedelta(seconds=5)


class Elsewhere(Exception):
    """Another rank has failed, and says why."""


@dataclass(frozen=True)
class Group:
    """The processes that share a run. With one there is nobody to talk to, and every method does the plain thing."""

    rank: int = 0
    world: int = 1
    local: int = 0  # the rank on its machine: its accelerator

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def micro_batches(self, k: int) -> range:
        """Which of a step's k micro-batches are computed here."""
        return range(k) if self.world == 1 else range(self.rank, self.rank + 1)

    def total(self, value: float) -> float:
        """The sum over all ranks, the same on each."""
        if self.world == 1:
            return value
        added = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(added)
        return float(added)

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, given to all ranks; the others wait. If it fails there, they raise Elsewhere."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None]  # stays so where the work fails
        if self.leads:
            try:
                answer = [(work(),)]
            except Exception:
                dist.broadcast_object_list(answer)
                raise
        dist.broadcast_object_list(answer)
        if answer[0] is None:
            raise Elsewhere
        return answer[0][0]  # type: ignore[no-any-return]

    def each(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank. Rank 0 goes first, for it may download what the others then find. If it fails on any
        rank, the first that failed raises its error, and the others Elsewhere."""
        if self.world == 1:
            return work()
        for turn in (self.leads, not self.leads):
            error = None
            if turn:
                try:
                    found = work()
                except Exception as raised:
                    error = raised
            failed = torch.tensor(self.rank if error else self.world)
            dist.all_reduce(failed, dist.ReduceOp.MIN)
            if int(failed) < self.world:
                raise (error if error and int(failed) == self.rank else Elsewhere())
        return found


def here() -> Group:
    """The ranks that this process has joined; where it has joined none, itself alone."""
    return (
        Group(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
        if dist.is_initialized()
        else Group()
    )


def join() -> Group:
    """Joins the ranks that torchrun started."""
    store, rank, world = next(rendezvous("env://"))
    # one machine: the count of restarts is the same on all ranks
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store over a restart, and with it the addresses of ranks that are gone (pytorch issue 135712)
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    if rank:
        warnings.filterwarnings("ignore", "gaf: ")  # rank 0 gives them
    return here()


def leave(code: int) -> int:
    """Leaves them. After a failure all leave together, for torchrun would stop the one that is still saying why. After Ctrl-C
    (130) there is no waiting: where a rank ends, those that wait for it do."""
    if code == 2:
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(timeout=FAREWELL)
    if code != 130:
        dist.destroy_process_group()
    return code


def launch() -> str | None:
    """What tells one torchrun command from every other and stays the same when it starts its workers again; None without torchrun.

    The count of restarts would not do: it is each machine's own, and stays 0 on those where nothing failed.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return (
        None
        if name is None
        else hashlib.sha256(f"{name} {socket.gethostname()} {os.getppid()}".encode()).hexdigest()[
            :12
        ]
    )


def check(config: TrainConfig, world: int) -> None:
    """ConfigError where `world` ranks cannot run the config."""
    if world > 1 and config.k != world:
        raise ConfigError(f"k must be the number of ranks, for each computes one micro-batch; got k = {config.k} on {world} ranks. "
                          f"Start {config.k} of them (torchrun --nproc-per-node), or set --k {world}.")  # fmt: skip
    if world > 1 and config.bn == "accepted":
        raise ConfigError("bn must be 'all' on several ranks: DistributedDataParallel hands out the statistics of rank 0, accepted or "
                          f"not; got 'accepted' on {world} ranks. Set --bn all, or run one process.")  # fmt: skip
    if world > 1 and config.compile:
        raise ConfigError(
            f"compile must be off on several ranks; got it on {world}. Set --no-compile, or run one process."
        )
    if world > 1 and config.loss == "elr":
        raise ConfigError("loss must not be 'elr' on several ranks: what the model said of a sample is known to the rank that drew it "
                          f"alone; got 'elr' on {world} ranks. Run one process.")  # fmt: skip
    if world > 1 and config.policy == "gaf" and config.scope == "group":
        raise ConfigError("scope must be 'all' on several ranks: gaf.attach tells of the bucket that it decided on last alone, and the "
                          f"records want all; got 'group' on {world} ranks. Run one process.")  # fmt: skip


class OverRanks:
    """gaf.attach with the methods of gaf.Accumulator: a backward pass on each rank, then a step or none on all."""

    def __init__(self, model: DistributedDataParallel, optimizer: Optimizer, policy: Any) -> None:
        self.optimizer, self.handle = optimizer, gaf.attach(model, optimizer, policy)

    @property
    def outcome(self) -> gaf.Outcome | None:
        return self.handle.outcome

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gate(self, scheduler: LRScheduler) -> LRScheduler:
        return self.handle.gate(scheduler)

    def stats(self, b: float = 1) -> dict[str, Any]:
        return self.handle.stats(b)

    def state_dict(self) -> dict[str, Any]:
        return self.handle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes an Accumulator's state too, which counts nothing per rank."""
        self.handle.load_state_dict({"rejected": [], "absent": []} | state)


def data_parallel(model: nn.Module, group: Group, x: Tensor, y: Tensor) -> DistributedDataParallel:
    """The model over all ranks, its buckets in their final order.

    DistributedDataParallel arranges its buckets anew after its first backward pass, and with them the order in which
    numbers are added. A pass over any pictures x and labels y, that changes nothing, has every start of a run add in
    the same order.
    """
    cuda = x.device.type == "cuda"
    gradients = dist.new_group(backend="nccl", timeout=PATIENCE) if cuda else None
    wrapped = DistributedDataParallel(
        model, device_ids=[group.local] if cuda else None, process_group=gradients
    )
    training = model.training
    wrapped.eval()  # moves no statistics
    nn.functional.cross_entropy(wrapped(x), y).backward()
    wrapped.zero_grad()
    wrapped.train(training)
    return wrapped
