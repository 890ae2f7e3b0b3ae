"""Training on wrong labels: rules, rivals and controls, at equal samples, over paired seeds.

    python benchmarks/label_training.py --pack results/label-training.jsonl

A multilayer perceptron (784-512-512-10, SGD 0.05 with momentum 0.9, steps of 160 samples, 30 passes
over nine tenths of the data, no augmentation) on MNIST-5k and on 5,000 pictures of Fashion-MNIST.
Every run evaluates both the weights and their average (0.99 a step). The runs are configs of the
lab (`gaf train`), so each is also one command, and a sweep that is interrupted goes on with the
same command.

    python benchmarks/label_training.py --human --seeds 3 --data FOLDER \
        --out runs/label-training-human --pack results/label-training-human.jsonl

On CIFAR-100N, whose labels are given by people: many rules with 100 classes, then some with 20.
ResNet18 with the ImageNet stem, 8 passes over nine tenths of the 50,000 pictures, shifted and
mirrored at random; about 8 minutes of a CPU core a run, so that the packs hold a part of the plan.

    python benchmarks/label_training.py --long 36 --sets cifar100n --data FOLDER --device cuda \
        --workers 20 --out runs/label-training-long --pack results/label-training-long.jsonl

The same network for 36 passes with a cosine schedule, so that it memorises: averaging, ELR and
weights, alone and with ELR. On a GPU many runs share one process, their steps CUDA graphs.

    python benchmarks/label_training.py --cost results/label-training-cost.jsonl

What each rule costs: the CPU time of ten passes as a multiple of averaging's in the same round.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from gaf_lab.records.measurements import write_measurements
from gaf_lab.records.packs import write_pack
from gaf_lab.settings.choices import PolicyName
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import Configs, follow
from gaf_lab.sweeps.sweep import sweep
from gaf_lab.training.listener import Listeners
from gaf_lab.training.run import train

BASE = TrainConfig(
    k=1, b=160, passes=30.0, eval_every=5.0, probe=500, ema=0.99, policy="mean", device="cpu"
)
AUDIT: dict[str, Any] = {"audit_passes": 12.0, "loss": "elr"}
CORE: dict[str, dict[str, Any]] = {
    "averaging": {},
    "GCE": {"loss": "gce"},
    "ELR": {"loss": "elr"},
    "prototype weights": {"agreement": "prototype"},
    "plain prototype weights": {"agreement": "plain-prototype"},
    "prototype weights, shuffled": {"agreement": "prototype", "shuffle_weights": True},
    "audit, restart with ELR": AUDIT,
    "the same, plain prototypes": {**AUDIT, "suspects": "plain-prototype"},
    "the same, random suspects": {**AUDIT, "suspects": "random"},
    "the same, the network's suspects": {**AUDIT, "suspects": "network"},
    "the same, no suspects": {**AUDIT, "suspects": "none"},
}
FEW = {name: CORE[name] for name in ("averaging", "prototype weights", "audit, restart with ELR")}
SOME = {**FEW, **{name: CORE[name] for name in ("ELR", "the same, no suspects", "GCE")}}
MORE: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "vote weights": {"agreement": "vote"},
    "loss weights": {"agreement": "loss"},
    "prototype weights with ELR": {"agreement": "prototype", "loss": "elr"},
    "prototype weights with GCE": {"agreement": "prototype", "loss": "gce"},
}
PLAIN = {name: CORE[name] for name in ("plain prototype weights", "the same, plain prototypes")}
WITH_ELR = {"ELR": CORE["ELR"], "prototype weights with ELR": MORE["prototype weights with ELR"]}
CONTROLS = {
    name: CORE[name] for name in ("the same, no suspects", "GCE", "prototype weights, shuffled")
}
RIVALS = {**FEW, **WITH_ELR, "GCE": CORE["GCE"]}
FILTER = {"GAF": {"policy": "gaf", "k": 8, "b": 20}}
SHARD: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.125, "sampler": "sharded"}
SETTINGS: dict[str, dict[str, Any]] = {
    "symmetric 40%": {"noise": "symmetric", "noise_rate": 0.4},
    "class-dependent 40%": {"noise": "asymmetric", "noise_rate": 0.4},
    "clean": {"noise": "none", "noise_rate": 0.0},
    "long tail": {"noise": "none", "noise_rate": 0.0, "imbalance": 50.0},
    "bad shard": SHARD,
}
RATES: dict[str, dict[str, Any]] = {
    f"{name} {rate}%": {"noise": noise, "noise_rate": rate / 100}
    for name, noise, rates in (
        ("symmetric", "symmetric", (10, 20, 60)),
        ("class-dependent", "asymmetric", (20,)),
    )
    for rate in rates
}
SETTINGS |= RATES
DATA: dict[str, dict[str, Any]] = {
    "mnist5k": {"dataset": "mnist5k"},
    "fashion-mnist": {"dataset": "fashion-mnist", "limit": 5000},
}
HUMAN_SETS = ("cifar100n", "cifar100n-coarse")
HUMAN: dict[str, Any] = {
    "noise": "human",
    "model": "resnet18",
    "stem": "imagenet",
    "augment": True,
    "passes": 8.0,
    "eval_every": 4.0,
    "probe": 1000,
    "channels_last": True,
}
HUMAN_AUDIT: dict[str, Any] = {**AUDIT, "audit_passes": 3.0}
ON_HUMAN: dict[str, dict[str, Any]] = {
    "averaging": {},
    **WITH_ELR,
    "audit, restart with ELR": HUMAN_AUDIT,
    **{name: CORE[name] for name in ("prototype weights", "GCE")},
    "the same, no suspects": {**HUMAN_AUDIT, "suspects": "none"},
    "label smoothing": MORE["label smoothing"],
    "GAF": {"policy": "gaf", "k": 2, "b": 80, "tau": 0.97},  # the paper's k and tau on CIFAR-100N
    "random skip": {},  # follows GAF's run, which with k = 2 a random subset would repeat
}
LONG = {name: ON_HUMAN[name] for name in ("averaging", "prototype weights", *WITH_ELR)}
ON_COARSE = {**FEW, **WITH_ELR, "audit, restart with ELR": HUMAN_AUDIT}


def plan_human(seeds: int, device: str) -> Configs:
    """The runs on human labels, of 100 classes and of 20."""
    found: Configs = []
    for name, arms in zip(HUMAN_SETS, (ON_HUMAN, ON_COARSE), strict=True):
        for label, arm in arms.items():
            for seed in range(seeds):
                shared = {**HUMAN, "dataset": name, "seed": seed, "device": device}
                if device != "cpu":
                    shared["autocast"] = "bfloat16"
                if label == "random skip":
                    found.append(random_control(found[-seeds], "random-skip", label))
                else:
                    found.append(dataclasses.replace(BASE, **shared, **arm, label=label))
    return found


def plan_long(seeds: int, device: str, passes: float, sets: list[str]) -> Configs:
    """Long runs on human labels, the rules of a seed after each other."""
    shared: dict[str, Any] = {**HUMAN, "passes": passes, "eval_every": passes / 8}
    shared |= {"schedule": "cosine", "device": device}
    if device != "cpu":
        shared |= {"autocast": "bfloat16", "engine": "device"}
    return [
        dataclasses.replace(BASE, **shared, **arm, dataset=name, seed=seed, label=label)
        for name in sets
        for seed in range(seeds)
        for label, arm in LONG.items()
    ]


def plan(seeds: int) -> Configs:
    found: Configs = []
    for name, setting, arms in order():
        for seed in range(seeds):
            shared = {**DATA[name], **SETTINGS[setting], "seed": seed}
            for label, arm in arms.items():
                found.append(dataclasses.replace(BASE, **shared, **arm, label=label))
            if arms is FILTER:
                found.append(random_control(found[-1], "random-subset", "random subset"))
    return found


def order() -> list[tuple[str, str, dict[str, dict[str, Any]]]]:
    """(data set, setting, arms), those first that are needed most."""
    next_class, symmetric = "class-dependent 40%", "symmetric 40%"
    noisy = [(name, setting) for name in DATA for setting in (next_class, symmetric)]
    shard = [("mnist5k", "bad shard", arms) for arms in (FEW, FILTER)]
    return [
        ("mnist5k", next_class, CORE),
        *((*where, SOME) for where in noisy[1:3]),
        ("mnist5k", "clean", FEW),
        ("mnist5k", "long tail", FEW),
        (*noisy[3], SOME),
        ("fashion-mnist", "clean", FEW),
        (*noisy[0], FILTER),
        *((*where, CORE) for where in noisy[1:]),
        *shard,
        *((*where, arms) for arms in (FILTER, MORE) for where in noisy),
        ("mnist5k", "long tail", PLAIN),
        *(("mnist5k", setting, WITH_ELR) for setting in ("clean", "long tail", "bad shard")),
        ("fashion-mnist", "clean", WITH_ELR),
        *(("mnist5k", setting, CONTROLS) for setting in ("bad shard", "clean", "long tail")),
        ("fashion-mnist", "clean", CONTROLS),
        *((name, setting, RIVALS) for setting in RATES for name in DATA),
    ]


def random_control(gaf: TrainConfig, policy: PolicyName, label: str) -> TrainConfig:
    unset = Path("unset")
    return follow(dataclasses.replace(gaf, policy=policy, replay=unset, label=label), gaf)


@dataclasses.dataclass
class Cost:
    rule: str
    cpu_ratios: list[float]

    def line(self) -> dict[str, Any]:
        median = statistics.median(self.cpu_ratios)
        return {"kind": "label-training-cost", **vars(self), "cpu_ratio_median": median}


def cpu_seconds(arm: dict[str, Any]) -> float:
    """Of ten passes, evaluations included; of an audit and a restart in the same proportion."""
    setting = {**DATA["mnist5k"], **SETTINGS["class-dependent 40%"], **arm, "passes": 10.0}
    config = dataclasses.replace(
        BASE, **setting | {"audit_passes": setting.get("audit_passes", 0) / 3}
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        train(config, Path(folder) / "run", Listeners(), keep_checkpoints=False)
        return time.process_time() - started


def measure_costs(path: Path, rounds: int = 3) -> None:
    arms = {**CORE, **MORE, **FILTER}
    found = {name: Cost(name, []) for name in arms}
    cpu_seconds({})  # reads the data
    for _ in range(rounds):
        seconds = {name: cpu_seconds(arm) for name, arm in arms.items()}
        for name, cost in found.items():
            cost.cpu_ratios.append(round(seconds[name] / seconds["averaging"], 3))
        write_measurements(list(found.values()), path, {"passes": 10, "rounds": rounds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/label-training"))
    parser.add_argument("--pack", type=Path, help="file for the finished runs")
    parser.add_argument("--human", action="store_true", help="CIFAR-100N, not the other data")
    parser.add_argument("--long", type=float, help="passes of long runs on CIFAR-100N, no others")
    sets: dict[str, Any] = {"nargs": "+", "default": list(HUMAN_SETS), "choices": HUMAN_SETS}
    parser.add_argument("--sets", **sets, help="for --long: 100 classes, 20 classes")
    parser.add_argument("--data", type=Path, help="folder of the files of a data set")
    parser.add_argument("--cost", type=Path, help="only measure CPU times, for this file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for CIFAR-100N")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if options.cost is not None:
        measure_costs(options.cost)
        return
    where = options.seeds, options.device
    if options.long:
        configs = plan_long(*where, options.long, options.sets)
    else:
        configs = plan_human(*where) if options.human else plan(options.seeds)
    runs = sweep(
        configs,
        options.out,
        data_folder=options.data,
        console=Console(),
        command="python benchmarks/label_training.py",
        keep_checkpoints=False,
        workers=options.workers,
        engine="together",
    ).runs
    if options.pack is not None:
        write_pack(runs, options.pack)


if __name__ == "__main__":
    main()
