"""GAF in a plain PyTorch loop, as in the published scripts, with which ours is compared.

It filters in the obvious way: pictures one at a time through Pillow, a new DataLoader for each
micro-batch, gradients copied out and flattened. The samples of another task are taken one at a time
from its tensors or its Dataset, and collated.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from gaf_lab.bench.ways import filter_rows
from gaf_lab.data.items import Items
from gaf_lab.data.run_data import RunData
from gaf_lab.data.samples import Samples
from gaf_lab.data.sampling import derive_seed
from gaf_lab.data.trees import map_tensors, move_to
from gaf_lab.settings.config import TrainConfig
from gaf_lab.tasks.pictures import Normalise
from gaf_lab.training.objective import make_objective
from gaf_lab.training.optimizers import make_optimizer

PADDING = 4


class OnePicture(Dataset[tuple[Tensor, int]]):
    """Pictures transformed one at a time.

    Pillow image, random crop with padding 4, mirrored with probability 1/2, tensor, normalised.

    Args:
        x: (N, 3, H, W) uint8 on the CPU.
        y: labels (N,).
        mean, std: per channel, of pictures in [0, 1].
    """

    def __init__(self, x: Tensor, y: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.pixels, self.labels = x.permute(0, 2, 3, 1).contiguous().numpy(), y.tolist()
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.pixels[index])
        width, height = picture.size
        left, top = torch.randint(2 * PADDING + 1, (2,)).tolist()
        picture = ImageOps.expand(picture, PADDING).crop((left, top, left + width, top + height))
        if torch.rand(()) < 0.5:
            picture = ImageOps.mirror(picture)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
        return (x - self.mean) / self.std, self.labels[index]


class OneSample(Dataset[Any]):
    """The training samples of a task, one at a time, with the targets that are trained on."""

    def __init__(self, train: Samples) -> None:
        self.train = train

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        x, observed = self.train.x, self.train.observed
        if not isinstance(x, Items):
            return map_tensors(lambda tensor: tensor[i], x), self.train.labels[i]
        inputs, target = x.dataset[int(x.places[i])]
        return inputs, target if observed is None else observed[i]


class PlainLoop:
    """GAF without this library, at tau = 2.

    Args:
        config: gives k, b, sampler and optimizer.
        problem: gives the samples, the model and the loss.
        device: of the model.
        workers: processes of each DataLoader.
    """

    def __init__(
        self, config: TrainConfig, problem: RunData, device: torch.device, workers: int
    ) -> None:
        self.config, self.device, self.workers = config, device, workers
        train, self.problem = problem.train, problem
        prepare = problem.problem.prepare
        self.data: Dataset[Any] = OneSample(train.to(torch.device("cpu")))
        self.pictures = isinstance(train.x, Tensor) and isinstance(prepare, Normalise)
        if isinstance(train.x, Tensor) and isinstance(prepare, Normalise):
            pictures, labels = train.x.cpu(), train.labels.cpu()
            self.data = OnePicture(pictures, labels, prepare.mean, prepare.std)
        if config.sampler == "iid":
            self.groups = [list(range(len(train)))]
        else:
            classes = range(problem.classes)
            self.groups = [(train.truth == c).nonzero().flatten().tolist() for c in classes]
        self.model = fresh_model(problem)
        self.optimizer = make_optimizer(config, config.lr, list(self.model.parameters()))
        self.random = random.Random(config.seed)
        self.objective = make_objective(problem)

    def draw(self) -> list[int]:
        """The samples of a micro-batch: as many of each class, or any."""
        each = self.config.b // len(self.groups)
        return [i for group in self.groups for i in self.random.sample(group, each)]

    def micro_gradient(self) -> Tensor:
        """(n,), a copy."""
        loader = DataLoader(
            Subset(self.data, self.draw()),
            batch_size=self.config.b,
            shuffle=True,
            num_workers=self.workers,
            collate_fn=self.problem.problem.collate,
        )
        self.optimizer.zero_grad()
        for x, y in loader:
            x, y = move_to(x, self.device), move_to(y, self.device)
            output = self.model(x if self.pictures else self.problem.inputs(x))
            self.objective.of(output, y, torch.arange(self.config.b)).backward()
        copies = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in copies])

    def step(self) -> None:
        update = filter_rows([self.micro_gradient() for _ in range(self.config.k)])
        params = list(self.model.parameters())
        for p, part in zip(params, update.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()


def fresh_model(data: RunData) -> nn.Module:
    """The model that a training of this config begins with."""
    torch.manual_seed(derive_seed(data.config.seed, "weights"))
    return data.new_model()
