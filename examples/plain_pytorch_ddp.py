"""Digits with 40% of the training labels flipped: DistributedDataParallel, filtered and not.

The rows are the ranks.

pip install gaf scikit-learn; torchrun --nproc-per-node 4 examples/plain_pytorch_ddp.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gaf
from gaf.integrations.trackers import metrics

EPOCHS, B = 40, 20


def digits() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """1,200 pictures of which 480 carry another digit's label, and 597 clean ones to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(x), generator=rng).split(1200)
    others = (y[train] + torch.randint(1, 10, (1200,), generator=rng)) % 10
    labels = torch.where(torch.arange(1200) < 480, others, y[train])
    return TensorDataset(x[train], labels), x[test], y[test]


def train(policy: gaf.GAF | gaf.Mean) -> None:
    torch.manual_seed(0)
    data, test_x, test_y = digits()
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = gaf.attach(model, optimizer, policy)  # the loop below is DistributedDataParallel's
    sampler = DistributedSampler(data)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=B, sampler=sampler):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()  # a skip leaves parameters and momentum as they were
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    if dist.get_rank() == 0:
        print(
            f"{type(policy).__name__}: accuracy {accuracy:.3f}",
            {key: round(value, 3) for key, value in metrics(handle, b=B).items()},
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # on GPUs: nccl, and the model and its data on cuda:LOCAL_RANK
    train(gaf.Mean())
    train(gaf.GAF(tau=0.8))
    dist.destroy_process_group()
