"""How many training pictures each data set has, and their shape."""

from gaf_lab.settings.fields import TrainFields

PICTURES = {
    "digits": 1438,
    "mnist5k": 4000,
    "fashion-mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "cifar100n": 50_000,
    "cifar100n-coarse": 50_000,
    "noise": 50_000,
    "imagenet": 1_281_167,
}
SHAPES = {"digits": (1, 8, 8), "mnist5k": (1, 28, 28), "fashion-mnist": (1, 28, 28)}
COLOUR_SHAPE = (3, 32, 32)  # of all others, but for imagenet


def picture_shape(config: TrainFields) -> tuple[int, int, int]:
    """Channels, height and width."""
    if config.dataset == "imagenet":
        return 3, config.size, config.size
    return SHAPES.get(config.dataset, COLOUR_SHAPE)


def count_pictures(config: TrainFields) -> int:
    """Training pictures that the config uses, held-out ones included."""
    pictures = PICTURES[config.dataset]
    return min(config.limit or pictures, pictures)
