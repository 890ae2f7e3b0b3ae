"""How many training pictures each data set has."""

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
