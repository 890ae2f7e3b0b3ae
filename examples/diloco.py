"""DiLoCo among four processes, one of which is bad: wrong labels, and now and then a NaN.

Each process takes 20 steps by itself. Then an outer step with Nesterov momentum moves all of them
by what a policy makes of their four differences of weights (arXiv 2311.08105).

pip install gaf scikit-learn; torchrun --nproc-per-node 4 examples/diloco.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import gaf

ROUNDS, INNER_STEPS, B, BAD = 10, 20, 20, 1


def train(policy: gaf.GAF | gaf.Guard | gaf.Mean | gaf.Median) -> None:
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rank, rng = (x / 16).float(), dist.get_rank(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start = [p.detach().clone() for p in model.parameters()]
    outer = torch.optim.SGD(start, lr=0.7, momentum=0.9, nesterov=True)
    accepted = torch.zeros(4, dtype=torch.int64)
    for number in range(ROUNDS):
        for _ in range(INNER_STEPS):
            chosen = torch.randint(300, (4, B), generator=rng)[rank] * 4 + rank  # of its own 300
            labels = 9 - y[chosen] if rank == BAD else y[chosen]
            inner.zero_grad()
            cross_entropy(model(x[chosen]), labels).backward()
            inner.step()
        pairs = zip(start, model.parameters(), strict=True)
        deltas = [old - new.detach() for old, new in pairs]
        if rank == BAD and number % 5 == 4:
            deltas[0][0, 0] = torch.nan
        decision = gaf.all_reduce(deltas, policy)
        accepted += decision.accepted
        if decision.stepped:  # after a skip all of them start again from the same weights
            for old, delta in zip(start, deltas, strict=True):
                old.grad = delta
            outer.step()
        for old, new in zip(start, model.parameters(), strict=True):
            new.data.copy_(old)
    right = (model(x[1200:]).argmax(1) == y[1200:]).float().mean()
    if rank == 0:
        print(f"{type(policy).__name__}: accuracy {right:.3f}, accepted {accepted.tolist()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for policy in (gaf.Mean(), gaf.Guard(), gaf.Median(), gaf.GAF(tau=0.8, start="best")):
        train(policy)
    dist.destroy_process_group()
