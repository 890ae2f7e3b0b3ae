"""Pictures as arrays: those in folders of classes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gaf_lab.data.arrays import Arrays, split
from gaf_lab.data.jpeg import upright
from gaf_lab.data.sources import DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TESTS = ("test", "val", "valid", "validation")


def read_folders(folder: Path, size: int | None) -> Arrays:
    """The pictures (N, C, H, W) uint8 of FOLDER/CLASS/*, or FOLDER/train/CLASS/* and .../test.

    They have three channels, or one if all are grey. A sample's name is its file's path in FOLDER.

    Args:
        folder: as above.
        size: height and width to scale to; None if all have the same size.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: must be a folder of pictures; it is not. Is the path right?")
    inner = subfolders(folder)
    test = next((folder / name for name in TESTS if name in inner and "train" in inner), None)
    first = folder if test is None else folder / "train"
    classes = subfolders(first)
    files, y = labelled_files(first, classes)
    others, other_y = ([], y[:0]) if test is None else labelled_files(test, classes)
    names = [path.relative_to(folder).as_posix() for path in [*files, *others]]
    pictures = zip(names, map(open_picture, [*files, *others]), strict=True)
    x, n = stack(pictures, size, folder), len(y)
    if test is None:
        return split(x, y, classes, names)
    return Arrays((x[:n], y), (x[n:], other_y), classes, (names[:n], names[n:]))


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, but for hidden ones."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def labelled_files(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """The pictures of each class, and their labels."""
    files, labels = [], []
    for label, name in enumerate(classes):
        inside = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        found = [path for path in inside if path.suffix.lower() in PICTURE_SUFFIXES]
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"{folder}: must hold a folder of pictures for each class; it has none. "
            f"Put them into {folder}/CLASS/ ({', '.join(PICTURE_SUFFIXES)})."
        )
    check_folders(folder, classes, labels)
    return files, torch.tensor(labels)


def check_folders(folder: Path, classes: list[str], labels: list[int]) -> None:
    """Refuses a class's folder without pictures, and one of a class that is not trained on."""
    for name in subfolders(folder):
        if name not in classes:
            raise DataError(
                f"{folder / name}: must be a class of the training pictures; it is none of "
                f"{', '.join(classes[:10])}. Rename it, or take it out."
            )
        if classes.index(name) not in labels:
            raise DataError(
                f"{folder / name}: a class's folder must hold pictures; it has none "
                f"({', '.join(PICTURE_SUFFIXES)}). Take it out."
            )


def open_picture(path: Path) -> Image.Image:
    """A file's picture, upright."""
    try:
        # by its name Pillow maps plain TIFFs into memory, and mixes up the pixels of turned ones
        with path.open("rb") as file, Image.open(file) as picture:
            return upright(picture)
    except UnidentifiedImageError:
        why = "its format is none that is known"
    except OSError as error:
        why = str(error)
    raise DataError(f"{path}: must be a picture; {why}. Take it out.")


def stack(pictures: Iterable[tuple[str, Image.Image]], size: int | None, source: Path) -> Tensor:
    """(N, C, H, W) uint8, of pictures with their names."""
    named = list(pictures)
    found = [flatten(name, picture) for name, picture in named]
    sizes = {picture.size: name for name, picture in reversed(named)}
    if size is None and len(sizes) > 1:
        shown = " and ".join(f"{w} x {h} ({name})" for (w, h), name in sorted(sizes.items())[:2])
        raise DataError(
            f"{source}: pictures must have one size; these have {len(sizes)}, such as {shown}. "
            "Give one with --size 64."
        )
    mode = "L" if all(picture.mode in ("L", "1") for picture in found) else "RGB"
    arrays = []
    for picture in found:
        scaled = picture.convert(mode)
        if size is not None and scaled.size != (size, size):
            scaled = scaled.resize((size, size), Image.Resampling.BILINEAR)
        arrays.append(np.atleast_3d(np.asarray(scaled)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def flatten(name: str, picture: Image.Image) -> Image.Image:
    """The picture, on white where it is transparent. Refuses more than 8 bits: they would clip."""
    if picture.mode[0] in "IF":
        raise DataError(
            f"{name}: a picture must have 8 bits per channel; it has the mode {picture.mode!r}. "
            "Save it with 8, or write a task of your own (docs/your-task.md)."
        )
    if not picture.has_transparency_data:
        return picture
    grey = picture.mode in ("L", "LA", "La")
    seen = picture.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return whole.convert("L" if grey else "RGB")
