"""Digits with 40% of the training labels flipped: the Hugging Face Trainer, filtered and not.

pip install gaf transformers accelerate scikit-learn; python examples/huggingface_trainer.py
torchrun --nproc-per-node 2 examples/huggingface_trainer.py     # the same; rows are ranks
One seed, to see it run; docs/demo.md has measurements.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
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
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {"logits": logits} | loss


def digits() -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """1,200 pictures of which 480 carry another digit's label, and 597 clean ones to test on."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, rng = (x / 16).float(), torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(x), generator=rng).split(1200)
    others = (y[train] + torch.randint(1, 10, (1200,), generator=rng)) % 10
    labels = torch.where(torch.arange(1200) < 480, others, y[train])
    pairs = zip(x[train], labels, strict=True)
    return [{"pixels": pixels, "labels": label} for pixels, label in pairs], x[test], y[test]


def train(policy: gaf.GAF | None) -> None:
    set_seed(0)
    data, test_x, test_y = digits()
    sizes = {"per_device_train_batch_size": B, "gradient_accumulation_steps": K}
    options = {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 50, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, num_train_epochs=EPOCHS, **sizes, **options, **quiet)
        parts = {"model": Net(), "args": args, "train_dataset": data}
        trainer = Trainer(**parts) if policy is None else GAFTrainer(**parts, gaf_policy=policy)
        trainer.train()
    accuracy = (trainer.model(test_x)["logits"].argmax(1) == test_y).float().mean().item()
    logged = {k: round(v, 3) for k, v in trainer.state.log_history[-2].items() if "gaf/" in k}
    trainer.accelerator.print(
        f"{'GAF' if policy else 'averaging'}: accuracy {accuracy:.3f}", logged
    )


if __name__ == "__main__":
    train(None)
    train(gaf.GAF(tau=0.8))
