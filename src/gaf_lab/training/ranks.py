"""The processes of a run on several ranks.

`torchrun --nproc-per-node K -m gaf_lab train ...` computes one of the K micro-batches on each.

The ranks use two groups. Numbers, errors and turns go over gloo; on CUDA, gradients go over NCCL.
So a rank that waits for another one's evaluation or download blocks no accelerator's collective.
"""

import contextlib
import hashlib
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

Answer = TypeVar("Answer")

# for rank 0's downloads and evaluations; a rank that dies is noticed at once
PATIENCE = timedelta(hours=2)
FAREWELL = timedelta(seconds=5)


class Elsewhere(Exception):
    """Another rank has failed, and reports why."""


@dataclass(frozen=True)
class Group:
    """The processes that share a run. With a single one, no method communicates."""

    rank: int = 0
    world: int = 1
    local: int = 0  # the rank on its machine: its accelerator

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def micro_batches(self, k: int) -> range:
        """Those of a step's k micro-batches that this rank computes."""
        return range(k) if self.world == 1 else range(self.rank, self.rank + 1)

    def total(self, value: float) -> float:
        """The sum over all ranks, the same on each."""
        if self.world == 1:
            return value
        added = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(added)
        return float(added)

    def on_rank_0(self, work: Callable[[], Answer]) -> Answer:
        """Runs `work` on rank 0 and returns its result on all ranks; the others wait.

        If it fails there, they raise Elsewhere.
        """
        if self.world == 1:
            return work()
        answer: list[Any] = [None]  # remains so if the work fails
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

    def each(self, work: Callable[[], Answer]) -> Answer:
        """Runs `work` on each rank and returns this rank's result.

        Rank 0 goes first: it may download what the others then find. If it fails on any rank, the
        first of those raises its error, and the others raise Elsewhere.
        """
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
                raise error if error and int(failed) == self.rank else Elsewhere()
        return found


ALONE = Group()


def here() -> Group:
    """The ranks that this process has joined; if it has joined none, itself alone."""
    if not dist.is_initialized():
        return ALONE
    return Group(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def join() -> Group:
    """Joins the ranks that torchrun started."""
    store, rank, world = next(rendezvous("env://"))
    # one machine: the count of restarts is the same on all ranks
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store across restarts, with the addresses of ranks that have exited
        # (pytorch issue 135712)
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    if rank:
        warnings.filterwarnings("ignore", "gaf: ")  # rank 0 issues them
    return here()


def leave(code: int) -> NoReturn:
    """Leaves the ranks and ends the process with this exit code.

    The interpreter is not shut down: a thread of torch's process groups that runs meanwhile would
    abort the process ("terminate called without an active exception"), and torchrun would count
    the finished run as a failed one.

    After a failure all leave together, because torchrun would stop the one that is still reporting
    the error. If one rank alone has failed, the others still wait for it: it leaves them. After
    Ctrl-C (130) nobody waits: when a rank exits, those that wait for it do too.
    """
    together = code != 2 or met()
    if together and code != 130:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def met() -> bool:
    """Whether all ranks come to leave in time.

    A barrier among ranks of which one waits for other work may outlast its own timeout.
    """
    meeting = threading.Thread(target=try_to_meet, daemon=True)
    meeting.start()
    meeting.join(2 * FAREWELL.total_seconds())
    return not meeting.is_alive()


def try_to_meet() -> None:
    with contextlib.suppress(RuntimeError):
        dist.monitored_barrier(timeout=FAREWELL)


def launch() -> str | None:
    """An identifier of the torchrun command, which stays the same over restarts of its workers.

    The count of restarts would not do: each machine has its own, which stays 0 if nothing failed
    there.

    Returns:
        the identifier; None without torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    command = f"{name} {socket.gethostname()} {os.getppid()}"
    return hashlib.sha256(command.encode()).hexdigest()[:12]
