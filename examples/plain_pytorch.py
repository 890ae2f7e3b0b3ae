"""Digits with 40% of the training labels flipped: a loop of plain PyTorch, filtered and not.

pip install gaf scikit-learn; python examples/plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gaf
from gaf.integrations.trackers import metrics

EPOCHS, K, B = 40, 6, 20


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
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    acc = gaf.Accumulator(optimizer, policy)
    scheduler = acc.gate(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.999))
    loader = DataLoader(data, batch_size=B, shuffle=True)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader):
            # the mean over this micro-batch; not divided by K
            acc.backward(cross_entropy(model(x), y))
            if (i + 1) % K == 0:
                acc.decide()  # p.grad holds the update: the place to clip
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                acc.step()
                scheduler.step()  # stands still on a skip
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(
        f"{type(policy).__name__}: accuracy {accuracy:.3f}",
        {key: round(value, 3) for key, value in metrics(acc, b=B).items()},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network this small is fastest on one
    train(gaf.Mean())
    train(gaf.GAF(tau=0.8))
