"""What a field of a run's config can name: data, noise, networks, optimizers, policies."""

from typing import Literal

CifarName = Literal["cifar10", "cifar100", "cifar100n", "cifar100n-coarse"]
DataName = Literal["digits", "mnist5k", "fashion-mnist", CifarName, "noise", "imagenet"]
NoiseName = Literal["none", "symmetric", "asymmetric", "human", "task"]
SamplerName = Literal["iid", "stratified-observed", "stratified-clean", "sharded"]
ModelName = Literal[
    "mlp", "mlp-small", "convnet", "resnet18", "resnet34", "preact-resnet34", "vit-l16", "vit-tiny"
]
PackagedName = Literal["lamb", "lion", "soap", "shampoo", "schedule-free"]
OfAllRowsName = Literal["adamw-all", "rmsprop-all"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "muon", PackagedName, OfAllRowsName]
MetricName = Literal["euclidean", "optimizer", "whitened"]
ThresholdName = Literal["fixed", "auto", "signal", "noise-floor", "quantile", "moving-average"]
ControlName = Literal["random-skip", "replay-skip", "random-subset", "scaled-lr"]
GrowingName = Literal["until-agreement", "replay-sizes", "mean-size"]
PolicyName = Literal["mean", "gaf", ControlName, "guard", "median", GrowingName]
