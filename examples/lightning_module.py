"""Digits with 40% of the training labels flipped: Lightning's Trainer, filtered and not.

pip install gaf lightning scikit-learn; python examples/lightning_module.py
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import gaf
from gaf.integrations.lightning import GAFCallback

EPOCHS, K, B = 40, 6, 20


def digits() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """1,200 pictures of which 480 carry another digit's label, and 597 clean ones to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(x), generator=rng).split(1200)
    others = (y[train] + torch.randint(1, 10, (1200,), generator=rng)) % 10
    labels = torch.where(torch.arange(1200) < 480, others, y[train])
    return TensorDataset(x[train], labels), x[test], y[test]


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> tuple[list[object], list[object]]:
        sgd = optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [sgd], [{"scheduler": optim.lr_scheduler.StepLR(sgd, 1, 0.999), "interval": "step"}]


def train(policy: gaf.GAF | None) -> None:
    pl.seed_everything(0)
    data, test_x, test_y = digits()
    callbacks = [] if policy is None else [GAFCallback(policy, b=B)]
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(shown, False) | {"accelerator": "cpu", "devices": 1}
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=K, callbacks=callbacks, **options
    )
    model = Digits()
    trainer.fit(model, DataLoader(data, batch_size=B, shuffle=True))
    accuracy = (model.net(test_x).argmax(1) == test_y).float().mean().item()
    logged = {key: round(value.item(), 3) for key, value in trainer.callback_metrics.items()}
    print(f"{'GAF' if policy else 'averaging'}: accuracy {accuracy:.3f}", logged)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network this small is fastest on one
    train(None)
    train(gaf.GAF(tau=0.8))
