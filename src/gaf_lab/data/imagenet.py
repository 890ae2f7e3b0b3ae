"""ImageNet from its usual folder of JPEG files, read by worker processes while the model computes; never all of it in memory.

    DIR/train/n01440764/n01440764_10026.JPEG      DIR, or DIR/imagenet, or DIR/ILSVRC/Data/CLS-LOC
    DIR/val/n01440764/ILSVRC2012_val_00000293.JPEG

What a micro-batch holds, and how each of its pictures is cropped, is a function of the seed and of the micro-batch's number
alone: any process can read any micro-batch, and workers read ahead in the order of the numbers.
"""

import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gaf_lab.data import archives
from gaf_lab.data.archives import DataError
from gaf_lab.data.sampling import Sampler, generator

# the last one is where the archive of the Kaggle challenge unpacks to
PLACES = ("", "imagenet", "ILSVRC/Data/CLS-LOC")
SUFFIXES = (".jpeg", ".jpg", ".png")
LAYOUT = "train/<class>/*.JPEG and val/<class>/*.JPEG"
# of its training pictures, as everyone rounds them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# of a random crop: share of the picture, width over height (arXiv 1409.4842, section 6)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10  # crops drawn before the middle of the picture is taken
MIDDLE = 224 / 256  # of the shorter side, is what a test picture shows

AHEAD = 2  # micro-batches that each worker has read and not handed over
MOST_WORKERS = 16


# Which files there are


def root(folder: Path | None) -> Path:
    """The folder that holds train and val.

    Args:
        folder: where to look: itself, imagenet in it, ILSVRC/Data/CLS-LOC in it. None: the cache (`archives.cache`).

    Raises:
        DataError: where there is none.
    """
    archives.check_folder(folder)
    place = folder or archives.cache()
    for candidate in (place / name for name in PLACES):
        there = [part for part in ("train", "val") if (candidate / part).is_dir()]
        if len(there) == 2:
            return candidate
        if there:
            missing = "val" if there == ["train"] else "train"
            raise DataError(
                f"imagenet: {candidate} must hold {LAYOUT}; it has {there[0]}, but no {missing}. Put that folder beside it."
            )
    raise DataError(f"imagenet: {place} must hold {LAYOUT}, in itself or in {' or '.join(PLACES[1:])}; it does not. It is not downloaded, "
                    "for it needs an account at image-net.org: get it there, and give its folder with --data DIR.")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Files:
    """Pictures (N, 3, size, size) uint8 that stay in their files until they are asked for.

    Attributes:
        folder: holds them. names: (N,) paths in it, as bytes of one width: 40 MB for ImageNet, which processes share.
        size: height and width that they are brought to.
    """

    folder: Path
    names: "np.ndarray[Any, np.dtype[np.bytes_]]" = field(repr=False)
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor) -> "Files":
        return Files(self.folder, self.names[index.numpy()], self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def read(self, index: Iterable[int], draw: torch.Generator | None = None) -> Tensor:
        """Pictures (len(index), 3, size, size) uint8, each a random crop if there is a generator to draw it from, else the middle."""
        paths = [self.folder / os.fsdecode(self.names[i]) for i in index]
        crops: list[Tensor | None] = (
            [None] * len(paths) if draw is None else list(draws(len(paths), draw).unbind())
        )
        pictures = torch.empty(len(paths), *self.shape[1:], dtype=torch.uint8)
        for picture, path, crop in zip(pictures, paths, crops, strict=True):
            picture.copy_(cropped(decoded(path), self.size, crop))
        return pictures

    def split(self, n: int) -> Iterator[Tensor]:
        """All pictures in order, their middle, n at a time (the last time those that are left), read ahead by workers."""
        return ahead(Chunks(self, n), range(math.ceil(len(self) / n)))


def listed(folder: Path, classes: list[str], size: int) -> tuple[Files, Tensor]:
    """The pictures of the class folders in `folder`, by class and name, and their labels (N,) int64: places in `classes`.

    Raises:
        DataError: for a class folder without a picture.
    """
    names, counts = [], []
    for wnid in classes:
        found = pictures_in(folder / wnid) if (folder / wnid).is_dir() else []
        if not found and (folder / wnid).is_dir():
            raise DataError(f"imagenet: class folder {folder / wnid} must hold a picture ({', '.join(SUFFIXES)}); it holds none. "
                            "Unpack its archive again, or remove the folder.")  # fmt: skip
        names += [os.fsencode(f"{wnid}/{name}") for name in found]
        counts.append(len(found))
    return Files(folder, np.array(names), size), torch.arange(len(classes)).repeat_interleave(
        torch.tensor(counts)
    )


def find(
    folder: Path | None, size: int
) -> tuple[list[str], tuple[Files, Tensor], tuple[Files, Tensor]]:
    """The classes, sorted, and of training and of validation set the files, and labels (N,) int64.

    Args:
        folder: see `root`.
        size: height and width that pictures are brought to.

    Raises:
        DataError: where the folder is not as the layout says.
    """
    place = root(folder)
    classes, tested = folders_in(place / "train"), folders_in(place / "val")
    if not classes:
        raise DataError(f"imagenet: {place / 'train'} must hold a folder for each class; it holds none. Unpack the classes' archives, each "
                        "into a folder of its name.")  # fmt: skip
    if not tested:
        flat = len(pictures_in(place / "val"))
        raise DataError(f"imagenet: {place / 'val'} must hold a folder for each class; it holds none, and {flat} pictures, as downloaded. "
                        "Move each picture into the folder of its class: docs/imagenet.md has the command.")  # fmt: skip
    if unknown := sorted(set(tested) - set(classes)):
        raise DataError(f"imagenet: every class in {place / 'val'} must be in {place / 'train'}; {len(unknown)} of {len(tested)} are "
                        f"not, {unknown[0]} for one. Are both of the same ImageNet, and whole?")  # fmt: skip
    return classes, listed(place / "train", classes, size), listed(place / "val", classes, size)


def folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def pictures_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )


# From a file to a picture


def decoded(path: Path) -> Image.Image:
    """A JPEG or PNG file as RGB, also where it is grey or CMYK.

    Raises:
        DataError: where it is missing, cut off or something else.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"imagenet: {path} must be a whole JPEG or PNG file; it cannot be read ({error}). Unpack it again."
        ) from None


def draws(n: int, generator: torch.Generator) -> Tensor:
    """What n random crops are made of, (n, TRIES + 1, 4) float64 in [0, 1): as much whatever the pictures are."""
    return torch.rand(n, TRIES + 1, 4, generator=generator, dtype=torch.float64)


def cropped(image: Image.Image, size: int, draw: Tensor | None) -> Tensor:
    """(3, size, size) uint8: the random crop, perhaps mirrored, that `draw` (TRIES + 1, 4) stands for; without it the middle."""
    box = middle_box(*image.size) if draw is None else random_box(*image.size, draw[:-1].tolist())
    pixels = torch.from_numpy(
        np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    ).permute(2, 0, 1)
    return pixels.flip(2) if draw is not None and draw[-1, 0] < 0.5 else pixels


Box = tuple[float, float, float, float]  # left, top, right, bottom


def middle_box(width: int, height: int) -> Box:
    """The square in the middle that is left of a picture whose shorter side is brought to size * 256 / 224, cropped to size."""
    return centred(width, height, min(width, height) * MIDDLE, min(width, height) * MIDDLE)


def centred(width: int, height: int, across: float, down: float) -> Box:
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def random_box(width: int, height: int, tries: list[list[float]]) -> Box:
    """A crop of AREA and RATIO anywhere in the picture: the first try that fits, else the largest in the middle with a ratio allowed.

    Args:
        width: of the picture, in pixels.
        height: likewise.
        tries: for each the area, the logarithm of the ratio, the place across and down, as shares in [0, 1) of their ranges.
    """
    for area, ratio, x, y in tries:
        pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        across, down = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = math.floor(x * (width - across + 1)), math.floor(y * (height - down + 1))
            return left, top, left + across, top + down
    return centred(width, height, min(width, height * RATIO[1]), min(height, width / RATIO[0]))


# Reading ahead


@dataclass(frozen=True, eq=False)
class Chunks:
    """Part j of the pictures: n of them from j * n on."""

    files: Files
    n: int

    def __call__(self, j: int) -> Tensor:
        return self.files.read(range(j * self.n, min((j + 1) * self.n, len(self.files))))


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Micro-batch `number` = step * k + i: pictures (b, 3, size, size) uint8, cropped at random where `augment` is set."""

    files: Files
    sampler: Sampler
    seed: int
    k: int
    augment: bool

    def __call__(self, number: int) -> Tensor:
        draw = generator(self.seed, "augment", *divmod(number, self.k)) if self.augment else None
        return self.files.read(self.sampler.draw(number).tolist(), draw)


Read = Callable[[int], Tensor]


class Reader:
    """Reads by number: any number at once, and those that follow it `stride` apart from what workers have read ahead."""

    def __init__(self, read: Read, stride: int) -> None:
        self._read, self._stride = read, stride
        self._due: int | None = None
        self._stream: Iterator[Tensor] = iter(())

    def __call__(self, number: int) -> Tensor:
        if number != self._due:
            self._stream = iter(())  # the workers of the stream before end first
            self._stream = ahead(self._read, itertools.count(number, self._stride))
        self._due = None  # so it stays where the reading fails
        found = next(self._stream)
        self._due = number + self._stride
        return found


def ahead(read: Read, numbers: Iterable[int]) -> Iterator[Tensor]:
    """read(n) for each number in order, by worker processes, each of which stays at most AHEAD of them before what is taken.

    Raises:
        DataError: what a worker raised; or where a worker was ended from outside.
    """
    # a generator of its own: torch's global one, which a resumed run must find unmoved, gives workers their seeds otherwise
    loader: DataLoader[Any] = DataLoader(
        Guarded(read), batch_size=None, sampler=numbers, num_workers=workers(), prefetch_factor=AHEAD, generator=torch.Generator(),
        worker_init_fn=follow,
    )  # fmt: skip
    try:
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found
    except RuntimeError as error:
        raise lost(error) from None


class Guarded(Dataset[Tensor | DataError]):
    """In a worker a DataError is handed over as it is: raised there, its message would reach the user wrapped in a traceback."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, number: int) -> Tensor | DataError:
        try:
            return self._read(number)
        except DataError as error:
            return error


def follow(worker: int) -> None:
    """Ends this worker as soon as its run is gone.

    The DataLoader's own look every five seconds misses a run that is gone before the worker is ready; and a worker that
    stays keeps the connections of its rank open, so that the other ranks do not notice.
    """
    run = multiprocessing.parent_process()
    assert run is not None

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def workers() -> int:
    """Processes that read for one rank: one for each core it has, at most MOST_WORKERS."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST_WORKERS))


def lost(error: RuntimeError) -> Exception:
    """The error to raise in place of one of the DataLoader's: where a worker was ended, what to do about it."""
    if not str(error).startswith("DataLoader worker"):
        return error
    seen = str(error).splitlines()[0]
    return DataError(f"imagenet: every process that reads pictures must live as long as the run; one did not ({seen}) The system ends "
                     "processes where memory is short: free some, or lower b, and go on with --resume.")  # fmt: skip


# Pictures in place of ImageNet's


def make_pictures(folder: Path, classes: int, per_class: int, size: int, seed: int = 0) -> Path:
    """Writes JPEG files in ImageNet's layout that a small network can tell apart, for tests and trials; returns the folder.

    Class c of C is a grating at angle pi c / C, of a phase, place and shape of picture of its own, in colours of hue c / C, under noise.

    Args:
        folder: gets train and val; made where it is missing.
        classes: C, at least 1.
        per_class: training pictures of each, at least 1; for test a quarter of that, at least one.
        size: pixels of the shorter side; the longer one has up to half as many again.
        seed: the same seed, the same pictures.
    """
    for part, count in (("train", per_class), ("val", max(1, per_class // 4))):
        for c in range(classes):
            home = folder / part / f"n{c:08d}"
            home.mkdir(parents=True, exist_ok=True)
            for j in range(count):
                grating(c / classes, size, generator(seed, "picture", part, c, j)).save(
                    home / f"n{c:08d}_{j}.JPEG", quality=90
                )
    return folder


def grating(turn: float, size: int, draw: torch.Generator) -> Image.Image:
    """A picture of the class at `turn` in [0, 1)."""
    phase, longer, upright = torch.rand(3, generator=draw).tolist()
    sides = (size, size + round(size * longer / 2))
    height, width = sides[::-1] if upright < 0.5 else sides
    down, across = torch.meshgrid(
        torch.arange(height) / size, torch.arange(width) / size, indexing="ij"
    )
    along = across * math.cos(math.pi * turn) + down * math.sin(math.pi * turn)
    wave = torch.sin(2 * math.pi * (4 * along + phase))[:, :, None]
    colour = torch.cos(2 * math.pi * (turn - torch.arange(3) / 3))
    noise = torch.randn(height, width, 3, generator=draw)
    return Image.fromarray(
        (128 + 60 * colour + 40 * wave + 20 * noise).clamp(0, 255).to(torch.uint8).numpy()
    )
