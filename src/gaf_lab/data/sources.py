"""Where the public data sets come from: addresses and checksums."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# of the Debian package dataset-fashion-mnist
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class DataError(Exception):
    """A data file is missing, broken, not the expected one, or asks for code to be run."""


@dataclass(frozen=True)
class Source:
    """Where one file comes from. md5: of the file as published at the URL."""

    file: str
    url: str
    md5: str

    def remedy(self, folder: Path) -> str:
        """The end of an error message: how to get the file into `folder`."""
        return (
            f"Download {self.url} (md5 {self.md5}) into {folder}, "
            "or give the folder that holds it: --data DIR."
        )


@dataclass(frozen=True)
class Archive:
    """A `.tar.gz` that unpacks to one folder. md5: of each file in that folder, by name."""

    source: Source
    folder: str
    md5: Mapping[str, str]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"

CIFAR10 = Archive(
    Source(
        "cifar-10-python.tar.gz",
        f"{_TORONTO}/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    "cifar-10-batches-py",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Archive(
    Source(
        "cifar-100-python.tar.gz",
        f"{_TORONTO}/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "cifar-100-python",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
HUMAN_LABELS = Source(
    "CIFAR-100_human.pt",
    "https://github.com/UCSC-REAL/cifar-10-100n/raw/main/data/CIFAR-100_human.pt",
    "a67b45c1d7992051865b5c755bd68bb1",
)
FASHION_MNIST = {  # each with the md5 of the unpacked content
    Source(f"{name}.gz", f"{_FASHION}/{name}.gz", packed): unpacked
    for name, packed, unpacked in [
        (
            "train-images-idx3-ubyte",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        (
            "train-labels-idx1-ubyte",
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
        (
            "t10k-images-idx3-ubyte",
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        (
            "t10k-labels-idx1-ubyte",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ]
}
