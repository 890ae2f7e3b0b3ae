"""Lightning's Trainer against a loop written out by hand, and against itself without a filter; on one device and on two ranks."""

import csv
import logging
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from oracle import alike, network, samples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import gaf

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from gaf.integrations.lightning import GAFCallback, GAFDDPStrategy  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
BATCH, K, TAU = 4, 8, 0.8
SAMPLES = 15 * K * BATCH // 2  # an epoch is 7 macro-batches of 8 and one of 4


class Module(pl.LightningModule):
    def __init__(self, optimizer: Any = SGD, decay: float = 0.97) -> None:
        super().__init__()
        self.net, self.make, self.decay = network(), optimizer, decay

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x).float(), y)

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.net.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": StepLR(optimizer, 1, self.decay), "interval": "step"},
        }

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*samples(SAMPLES)), batch_size=BATCH)


def trainer(
    callbacks: Any = (),
    logger: Any = False,
    epochs: int = 2,
    k: int = K,
    devices: int = 1,
    **options: Any,
) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    kept = {"enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)}
    both = (
        quiet
        | kept
        | {
            "accelerator": "cpu",
            "devices": devices,
            "max_epochs": epochs,
            "accumulate_grad_batches": k,
        }
    )
    return pl.Trainer(callbacks=list(callbacks), logger=logger, **(both | options))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def fitted(
    callbacks: Any = (), module: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Any, Any]:
    module, run = module or Module(), trainer(callbacks, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return module, run


def by_hand(
    tau: float,
    world: int = 1,
    clip: float | None = None,
    epochs: int = 2,
    bf16: bool = False,
    k: int = K,
) -> tuple[Tensor, float]:
    """The paper's pseudocode in a loop: weights, and the share of steps taken. Rank r has every world-th sample, from r on."""
    net, steps, taken = network(), 0, 0
    optimizer = SGD(net.parameters())
    scheduler = StepLR(optimizer, 1, 0.97)
    shares = [
        [part.split(BATCH) for part in (x[r::world], y[r::world])]
        for r in range(world)
        for x, y in [samples(SAMPLES)]
    ]
    for _ in range(epochs):
        for start in range(0, len(shares[0][0]), k):
            rows = [[gradient(net, x, y, bf16) for x, y in zip(xs[start : start + k], ys[start : start + k], strict=True)]
                    for xs, ys in shares]  # fmt: skip
            rank_rows = (
                torch.stack([torch.stack(each).sum(0) / k for each in rows])
                if world > 1
                else torch.stack(rows[0])
            )
            update, _ = gaf.reference(rank_rows, tau)
            steps += 1
            if update is not None:
                taken += 1
                put(net, update)
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                scheduler.step()
    return flat(net), taken / steps


def gradient(net: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        logits = net(x)
    return torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(cross_entropy(logits.float(), y), list(net.parameters()))
        ]
    )


def put(net: nn.Module, update: Tensor) -> None:
    for p, part in zip(
        net.parameters(), update.split([p.numel() for p in net.parameters()]), strict=True
    ):
        p.grad = part.view_as(p).to(p.dtype)


def near(a: Tensor, b: Tensor) -> bool:
    """Within what float32 leaves of a few dozen steps: of the weights, whose largest is about 1."""
    return bool((a - b).abs().max() < 1e-6)


# ---------------------------------------------------------------------------------------------- one device


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.2}, {"precision": "bf16-mixed"}], ids=str
)
def test_weights_are_those_of_a_loop_written_by_hand(options):
    callback = GAFCallback(gaf.GAF(tau=TAU))
    module, run = fitted([callback], **options)
    expected, share = by_hand(
        TAU, clip=options.get("gradient_clip_val"), bf16="precision" in options
    )
    stats = callback.decider.stats()
    assert near(flat(module), expected)
    assert 0 < share < 1
    assert stats["stepped"] / stats["steps"] == share
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == stats["stepped"]
    assert run.global_step == stats["steps"] == 16


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.2}, {"precision": "bf16-mixed"}, {"k": 1}], ids=str
)
@pytest.mark.filterwarnings("ignore:gaf:UserWarning")  # k = 1: one row has nothing to agree with
def test_a_tau_that_accepts_all_is_lightning_itself(options):
    """Whole macro-batches: of a short one, Lightning divides the sum by more than there are."""
    callback = GAFCallback(gaf.GAF(tau=2))
    filtered, _ = fitted([callback], limit_train_batches=7 * K, **options)
    plain, _ = fitted(limit_train_batches=7 * K, **options)
    assert near(flat(filtered), flat(plain))
    assert callback.decider.stats()["stepped"] == (7 * K // options.get("k", K)) * 2


def in_float16(callbacks: Any, scale: float) -> tuple[Tensor, torch.amp.GradScaler, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    options = {
        "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        "limit_train_batches": 7 * K,
        "gradient_clip_val": 0.2,
    }
    module, run = fitted(callbacks, **options)
    return flat(module), scaler, run


def test_under_a_scaler_a_tau_that_accepts_all_is_lightning_itself():
    filtered, scaler, _ = in_float16([GAFCallback(gaf.GAF(tau=2))], 256.0)
    plain, _, _ = in_float16([], 256.0)
    assert scaler.get_scale() == 256
    # float16 has 11 bits; the summands there are an eighth of the rows here
    assert (filtered - plain).abs().max() < 1e-3


def test_a_scaler_sees_overflows_and_the_scale_falls_until_steps_are_taken():
    callback = GAFCallback(gaf.GAF(tau=2))
    _, scaler, run = in_float16([callback], 2.0**24)
    overflows = math.log2(2.0**24 / scaler.get_scale())
    stats = callback.decider.stats()
    assert 0 < overflows == stats["steps"] - stats["stepped"] < 14
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == stats["stepped"]


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.1)])
def test_a_skip_leaves_everything_alone(optimizer):
    """tau = 0: no two micro-gradients point the same way."""
    module = Module(optimizer)
    before = flat(module)
    _, run = fitted([GAFCallback(gaf.GAF(tau=0.0))], module)
    assert torch.equal(flat(module), before)
    assert run.optimizers[0].state_dict()["state"] == {}
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 0
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1
    assert run.global_step == 16


@pytest.mark.parametrize("policy", [partial(gaf.GAF, tau=TAU), partial(gaf.RandomSkip, 0.5)])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(tmp_path, policy):
    kept = GAFCallback(policy())
    whole, _ = fitted([kept], epochs=4)
    fitted([GAFCallback(policy()), ModelCheckpoint(tmp_path, save_last=True)], epochs=2)
    again = GAFCallback(policy())
    resumed, _ = fitted([again], epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(flat(resumed), flat(whole))
    # where a policy has no tau, it is NaN
    assert str(again.decider.stats()) == str(kept.decider.stats())
    assert again.decider.stats()["steps"] == 32


def test_a_checkpoint_in_the_middle_of_a_macro_batch_holds_the_last_step_and_disturbs_nothing(
    tmp_path,
):
    callback = GAFCallback(gaf.GAF(tau=TAU))
    module = Module()
    keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False, monitor=None)
    run = trainer([callback, keep], epochs=1, val_check_interval=2 * K + 3, num_sanity_val_steps=0)
    run.fit(
        module, val_dataloaders=DataLoader(TensorDataset(*samples(SAMPLES)), batch_size=SAMPLES)
    )
    # after 3 (2 K + 3) = 57 micro-batches
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["GAFCallback"]["telemetry"]["totals"]["steps"] == 7
    assert near(flat(module), by_hand(TAU, epochs=1)[0])


def test_an_epoch_that_is_broken_off_leaves_no_micro_gradients_to_the_next():
    class Stopped(Module):
        def on_train_batch_start(self, batch: Any, index: int) -> int | None:
            return -1 if index == K + 3 else None

    callback = GAFCallback(gaf.GAF(tau=2))
    fitted([callback], Stopped())
    assert callback.decider.stats()["micro_gradients"] == 2 * K


def test_a_macro_batch_without_losses_decides_nothing():
    class Silent(Module):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            return None if index < K else super().training_step(batch, index)

    callback = GAFCallback(gaf.GAF(tau=2))
    fitted([callback], Silent(), epochs=1)
    assert callback.decider.stats()["steps"] == 7


def test_the_trainers_logger_shows_agreement_at_every_step(tmp_path):
    callback = GAFCallback(gaf.GAF(tau=TAU), b=BATCH)
    _, run = fitted([callback], logger=CSVLogger(tmp_path, name="", version=""), epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    stats = callback.decider.stats(b=BATCH)
    assert [int(line["step"]) for line in lines] == list(range(16))
    for name in ("acceptance", "distance_mean", "distance_min", "noise_scale"):
        assert math.isclose(float(lines[-1][f"gaf/{name}"]), stats[name], rel_tol=1e-6)
    assert float(lines[-1]["gaf/skipped"]) == stats["steps"] - stats["stepped"] > 0
    assert float(run.callback_metrics["gaf/stepped"]) == stats["stepped"] / stats["steps"]


def test_only_clean_batch_norm_statistics_where_asked_for():
    class Normed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(13, 31), nn.BatchNorm1d(31), nn.Tanh(), nn.Linear(31, 5)
            )

    module, _ = fitted([GAFCallback(gaf.GAF(tau=0.0), bn="accepted")], Normed())
    assert torch.equal(module.net[1].running_mean, torch.zeros(31))


def test_what_stands_in_for_the_strategy_goes_when_fit_ends_or_fails():
    class Broken(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise ZeroDivisionError

    _, run = fitted([GAFCallback(gaf.GAF(tau=TAU))], epochs=1)
    assert not {"backward", "optimizer_step"} & vars(run.strategy).keys()
    run = trainer([GAFCallback(gaf.GAF(tau=TAU))])
    with pytest.raises(ZeroDivisionError):
        run.fit(Broken())
    assert not {"backward", "optimizer_step"} & vars(run.strategy).keys()


class ByHand(Module):
    automatic_optimization = False


class Own(Module):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Seldom(Module):
    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["frequency"] = 3
        return found


class Elsewhere(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize(("module", "strategy", "message"), [
    (ByHand, "auto", r"the module must use automatic optimization; automatic_optimization is False. There use gaf.Accumulator"),
    (Own, "auto", r"on one device the backward pass is the Accumulator's; Own has a backward\(\) of its own. Leave it out."),
    (Seldom, "auto", r"a scheduler with interval='step' must have frequency 1, .* got 3. Put the frequency into the scheduler."),
    (Module, Elsewhere("cpu"), r"the strategy must be lightning.pytorch's DDP or a single device; got test_lightning.Elsewhere. Use"),
])  # fmt: skip
def test_what_would_go_past_the_decision_is_refused(module, strategy, message):
    with pytest.raises((TypeError, ValueError), match=f"GAFCallback: {message}"):
        fitted([GAFCallback(gaf.GAF(tau=TAU))], module(), strategy=strategy, k=1)


# ---------------------------------------------------------------------------------------------- two ranks


def on_a_rank(
    policy: Any, way: str, ckpt_path: str | None = None, save: str | None = None, **options: Any
) -> dict[str, Any]:
    callback = None if policy is None else GAFCallback(policy)
    strategy: Any = "ddp"
    if way == "strategy":
        strategy = GAFDDPStrategy(policy)
        callback = strategy.callback
    callbacks = [callback] if way == "callback" and callback is not None else []
    keep = [ModelCheckpoint(save, save_last=True)] if save else []
    options = {
        "k": 2,
        "devices": 2,
        "strategy": strategy,
        "plugins": [LightningEnvironment()],
    } | options
    run = trainer([*callbacks, *keep], **options)
    module = Module()
    # Lightning would shuffle in its own sampler; rank r takes every second sample, from r on
    rank = torch.distributed.get_rank()
    x, y = samples(SAMPLES)
    loader = DataLoader(TensorDataset(x[rank::2], y[rank::2]), batch_size=BATCH)
    run.fit(module, loader, ckpt_path=ckpt_path)
    found = {
        "weights": flat(module),
        "steps": run.global_step,
        "rate": run.lr_scheduler_configs[0].scheduler.last_epoch,
    }
    return found | {
        "stats": None if callback is None else callback.decider.stats(),
        "state": run.optimizers[0].state_dict()["state"],
    }


def ranks_of(pair: Any, *args: Any, **options: Any) -> dict[str, Any]:
    first, second = pair.run(partial(on_a_rank, use_distributed_sampler=False, **options), *args)
    assert torch.equal(first["weights"], second["weights"])
    return first


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("way", "options"), [("callback", {}), ("strategy", {"gradient_clip_val": 0.2})]
)
def test_ranks_are_rows(pair, way, options):
    """What a rank accumulates is its row; the oracle is the paper's pseudocode in one process."""
    tau = 0.9
    found = ranks_of(pair, gaf.GAF(tau=tau), way, **options)
    expected, share = by_hand(tau, world=2, k=2, clip=options.get("gradient_clip_val"))
    assert near(found["weights"], expected)
    assert 0 < share < 1
    assert found["stats"]["stepped"] / found["steps"] == share
    assert found["rate"] == found["stats"]["stepped"]


@pytest.mark.distributed
def test_ranks_that_all_agree_are_lightnings_ddp(pair):
    filtered, plain = (ranks_of(pair, policy, "callback") for policy in (gaf.GAF(tau=2), None))
    assert near(filtered["weights"], plain["weights"])


@pytest.mark.distributed
def test_a_skip_among_ranks_leaves_everything_alone(pair):
    found = ranks_of(pair, gaf.GAF(tau=0.0), "callback", precision="bf16-mixed")
    assert torch.equal(found["weights"], flat(network()))
    assert found["state"] == {}
    assert found["rate"] == 0 < found["steps"]


@pytest.mark.distributed
def test_ranks_resume_to_the_same_weights_bit_for_bit(pair, tmp_path):
    whole = ranks_of(pair, gaf.GAF(tau=0.9), "strategy", epochs=2)
    ranks_of(pair, gaf.GAF(tau=0.9), "strategy", epochs=1, save=str(tmp_path))
    resumed = ranks_of(
        pair, gaf.GAF(tau=0.9), "strategy", epochs=2, ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert torch.equal(resumed["weights"], whole["weights"])
    assert alike(resumed["stats"], whole["stats"])
