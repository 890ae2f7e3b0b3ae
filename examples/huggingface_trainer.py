"""Digits with 40% of the training labels flipped: the Hugging Face Trainer, with and without filtering.

pip install gaf transformers accelerate scikit-learn; python examples/huggingface_trainer.py
torchrun --nproc-per-node 2 examples/huggingface_trainer.py     # the same; the rows are then the ranks
One seed, to see it run; docs/demo.md has measurements.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

import gaf
from gaf.integrations.transformers import GAFTrainer

EPOCHS, K, B = 15, 8, 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixels)
        return {"logits": logits} | (
            {} if labels is None else {"loss": cross_entropy(logits, labels)}
        )


def digits() -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """1,200 pictures of which 480 carry another digit's label, and 597 clean ones to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=rng)
    train, test = order[:1200], order[1200:]
    labels = torch.where(
        torch.arange(1200) < 480,
        (y[train] + torch.randint(1, 10, (1200,), generator=rng)) % 10,
        y[train],
    )
    return (
        [{"pixels": p, "labels": label} for p, label in zip(x[train], labels, strict=True)],
        x[test],
        y[test],
    )


def train(policy: gaf.GAF | None) -> None:
    set_seed(0)
    data, test_x, test_y = digits()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, num_train_epochs=EPOCHS, per_device_train_batch_size=B, optim="sgd",
                                 gradient_accumulation_steps=K, learning_rate=0.5, report_to="none", disable_tqdm=True,
                                 save_strategy="no", logging_steps=50)  # fmt: skip
        parts = {"model": Net(), "args": args, "train_dataset": data}
        trainer = Trainer(**parts) if policy is None else GAFTrainer(**parts, gaf_policy=policy)
        trainer.train()
    accuracy = (trainer.model(test_x)["logits"].argmax(1) == test_y).float().mean().item()
    told = {
        key: round(value, 3)
        for log in trainer.state.log_history
        for key, value in log.items()
        if key.startswith("gaf/")
    }
    if trainer.is_world_process_zero():
        print(f"{'averaging' if policy is None else 'GAF'}: accuracy {accuracy:.3f}", told)


if __name__ == "__main__":
    train(None)
    train(gaf.GAF(tau=0.8))
