"""A rank that dies or hangs: the others end with an error within the group's timeout."""

import os
import signal
import time

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import gaf
from helpers.problems import Wide, plain_loss
from helpers.ranks import Ranks

pytestmark = pytest.mark.distributed
TIMEOUT = 4.0


def lost(how: str) -> None:
    model = DistributedDataParallel(Wide())
    optimizer = SGD(model.parameters(), 0.1)
    gaf.attach(model, optimizer, gaf.GAF(2.0))
    for step in range(3):
        optimizer.zero_grad()
        loss = plain_loss(model, step, dist.get_rank())
        if step == 2 and dist.get_rank() == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10 * TIMEOUT)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_end_with_an_error(how: str) -> None:
    ranks = Ranks(3, TIMEOUT)
    try:
        for pipe in ranks.pipes:
            pipe.send((lost, (how,)))
        told = {}
        for rank in (0, 2):
            assert ranks.pipes[rank].poll(60), "still waiting after a minute"
            told[rank] = ranks.pipes[rank].recv()[1]
        assert all(
            "RuntimeError" in error or "DistBackendError" in error for error in told.values()
        )
    finally:
        ranks.broken = True
        ranks.close()
