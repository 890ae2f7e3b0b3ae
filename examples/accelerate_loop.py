"""Digits with 40% of the training labels flipped: a loop of Accelerate's, filtered and not.

pip install gaf accelerate scikit-learn; python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py     # the same; rows are ranks
One seed, to see it run; docs/demo.md has measurements.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gaf
from gaf.integrations.accelerate import attach
from gaf.integrations.trackers import metrics

EPOCHS, K, B = 15, 8, 10


def digits() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """1,200 pictures of which 480 carry another digit's label, and 597 clean ones to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(x), generator=rng).split(1200)
    others = (y[train] + torch.randint(1, 10, (1200,), generator=rng)) % 10
    labels = torch.where(torch.arange(1200) < 480, others, y[train])
    return TensorDataset(x[train], labels), x[test], y[test]


def train(policy: gaf.GAF | None) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    data, test_x, test_y = digits()
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.999)
    loader = DataLoader(data, batch_size=B, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    handle = None if policy is None else attach(accelerator, model, optimizer, policy)
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    logged = {} if handle is None else metrics(handle, b=B)
    name = "averaging" if policy is None else "GAF"
    accelerator.print(
        f"{name}: accuracy {accuracy:.3f}", {key: round(value, 3) for key, value in logged.items()}
    )


if __name__ == "__main__":
    train(None)
    train(gaf.GAF(tau=0.8))
