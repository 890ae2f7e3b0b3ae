"""Lightning against a loop by hand and itself unfiltered, on one device and on two ranks."""

import csv
import logging
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import gaf
from helpers.oracle import nearly_same, network, samples

pl = pytest.importorskip("lightning.pytorch")
from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision, Precision  # noqa: E402
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


def fit_module(
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
    """The paper's pseudocode in a loop: weights, and the share of steps taken.

    Rank r has every world-th sample, from r on.
    """
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
            part = slice(start, start + k)
            rows = []
            for xs, ys in shares:
                pairs = zip(xs[part], ys[part], strict=True)
                rows.append([gradient(net, x, y, bf16) for x, y in pairs])
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


# --------------------------------------------------------------------------------------- one device


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.2}, {"precision": "bf16-mixed"}], ids=str
)
def test_weights_are_those_of_a_loop_written_by_hand(options):
    callback = GAFCallback(gaf.GAF(tau=TAU))
    module, run = fit_module([callback], **options)
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
    "options",
    [
        {},
        {"gradient_clip_val": 0.2},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"k": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:gaf:UserWarning")  # k = 1: one row has nothing to agree with
def test_a_tau_that_accepts_all_is_lightning_itself(options):
    """Whole macro-batches: of a short one, Lightning divides the sum by more than there are."""
    callback = GAFCallback(gaf.GAF(tau=2))
    filtered, _ = fit_module([callback], limit_train_batches=7 * K, **options)
    plain, _ = fit_module(limit_train_batches=7 * K, **options)
    assert flat(plain).isfinite().all() and not near(flat(plain), flat(network()))
    assert near(flat(filtered), flat(plain))
    assert callback.decider.stats()["stepped"] == (7 * K // options.get("k", K)) * 2


class ClosureAlone(Module):
    """As Lightning's documentation has it: every second optimizer_step is the closure alone."""

    def optimizer_step(
        self, epoch: int, index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if index // self.trainer.accumulate_grad_batches % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Late(ClosureAlone):
    """Steps after the closure, by Lightning's own way."""

    def optimizer_step(
        self, epoch: int, index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        if index // self.trainer.accumulate_grad_batches % 2:
            super(ClosureAlone, self).optimizer_step(epoch, index, optimizer, lambda: None)


class ClearedByHand(ClosureAlone):
    """A hook clears gradients, by the wrapper that `self.optimizers()` gives."""

    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        pass

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index % self.trainer.accumulate_grad_batches == 0:
            self.optimizers().zero_grad(set_to_none=index % 3 == 0)


class ClearedRaw(ClearedByHand):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index % self.trainer.accumulate_grad_batches == 0:
            self.trainer.optimizers[0].zero_grad()


@pytest.mark.parametrize("kind", [ClosureAlone, Late, ClearedByHand, ClearedRaw])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.filterwarnings("ignore:gaf:UserWarning", "ignore:Detected call of `lr_scheduler")
def test_gradients_that_are_cleared_before_a_step_count_for_nothing(kind, k):
    """Weights and learning rate are Lightning's own."""
    callback = GAFCallback(gaf.GAF(tau=2))
    options = {"k": k, "limit_train_batches": 6 * 4}
    (filtered, run), (plain, expected) = (
        fit_module([callback], kind(), **options),
        fit_module(module=kind(), **options),
    )
    assert near(flat(filtered), flat(plain)) and not near(flat(plain), flat(network()))
    assert run.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]
    assert callback.decider.stats()["stepped"] == 2 * (6 * 4 // k) // 2


class Gathers(ClosureAlone):
    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        if index % 2 == 0:
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_module_that_accumulates_by_itself_is_refused():
    """Lightning would add its micro-gradients up undivided, where an update here is their mean."""
    message = (
        r".* must be accumulate_grad_batches = 1 micro-batches; .* of Gathers gathers more. Set the"
    )
    with pytest.raises(RuntimeError, match=f"GAFCallback: {message}"):
        fit_module([GAFCallback(gaf.GAF(tau=2))], Gathers(), k=1)


class Sharpness(Module):
    """A step of its own, past the optimizer that Lightning gives."""

    def optimizer_step(
        self, epoch: int, index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer_closure()
        for p in self.parameters():
            p.data -= 0.1 * (0 if p.grad is None else p.grad)


def test_a_module_that_never_steps_its_optimizer_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"60 micro-gradients came .* optimizer_step\(\) of Sharpness must call"
    ):
        fit_module([GAFCallback(gaf.GAF(tau=2))], Sharpness(), k=1, epochs=1)


class Extra(Module):
    def optimizer_step(
        self, epoch: int, index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.step(closure=optimizer_closure, step_index=3)


def test_more_than_a_closure_for_the_step_is_refused():
    with pytest.raises(
        TypeError, match=r"optimizer.step must be given a closure alone; got step_index. Leave"
    ):
        fit_module([GAFCallback(gaf.GAF(tau=2))], Extra())


class Sometimes(Module):
    def training_step(self, batch: Any, index: int) -> Tensor | None:
        return super().training_step(batch, index) if self.speaks(index) else None

    def speaks(self, index: int) -> bool:
        return index % 8 not in (0, 3, 7)


@pytest.mark.parametrize("tau", [TAU, 2.0])
def test_micro_batches_without_a_loss_are_no_rows(tau):
    """Also the first and the last of a macro-batch; the update is the mean over the rows."""
    callback, module, net = GAFCallback(gaf.GAF(tau=tau)), Sometimes(), network()
    fit_module([callback], module, epochs=1)
    optimizer = SGD(net.parameters())
    x, y = (part.split(BATCH) for part in samples(SAMPLES))
    for start in range(0, len(x), K):
        rows = [
            gradient(net, x[i], y[i], False)
            for i in range(start, min(start + K, len(x)))
            if module.speaks(i)
        ]
        update, _ = gaf.reference(torch.stack(rows), tau)
        if update is not None:
            put(net, update)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.97
    assert near(flat(module), flat(net))
    assert callback.decider.stats()["micro_gradients"] == sum(map(module.speaks, range(len(x))))


class Never(Module):
    def training_step(self, batch: Any, index: int) -> None:
        return None


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_any_loss_nothing_happens_that_lightning_would_not_do(k, precision):
    callback, options = GAFCallback(gaf.GAF(tau=2)), {"k": k, "precision": precision}
    (module, run), (_, plain) = (
        fit_module([callback], Never(), **options),
        fit_module(module=Never(), **options),
    )
    assert torch.equal(flat(module), flat(network())) and callback.decider.stats()["steps"] == 0
    assert run.global_step == plain.global_step
    assert (
        run.lr_scheduler_configs[0].scheduler.last_epoch
        == plain.lr_scheduler_configs[0].scheduler.last_epoch
    )


def test_fit_again_goes_on_as_lightning_does():
    ends = []
    for callbacks in ([GAFCallback(gaf.GAF(tau=2))], []):
        module, run = fit_module(callbacks, epochs=1, limit_train_batches=7 * K)
        run.fit_loop.max_epochs = 2
        run.fit(module)
        ends.append(flat(module))
        if callbacks:
            assert callbacks[0].decider.stats()["steps"] == 7  # counted anew
    assert near(*ends)


class Normed(Module):
    """Whose statistics a validation must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(network(), nn.BatchNorm1d(5))

    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch[0])


@pytest.mark.parametrize("bn", ["all", "accepted"])
def test_validation_before_and_within_an_epoch_changes_nothing(bn):
    ends = []
    for validation in (None, DataLoader(TensorDataset(*samples(3 * BATCH)), batch_size=BATCH)):
        module, callback = Normed(), GAFCallback(gaf.GAF(tau=TAU), bn=bn)
        run = trainer([callback], num_sanity_val_steps=2, val_check_interval=K + 3)
        run.fit(module, val_dataloaders=validation)
        ends.append((flat(module), module.net[1].running_mean, callback.decider.stats()))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    assert str(ends[0][2]) == str(ends[1][2]) and ends[0][2]["steps"] == 16


class ByEpoch(Module):
    """Schedulers that follow no steps: skips do not hold them back."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.net.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        by_epoch = {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"}
        by_value = {"scheduler": plateau, "interval": "step", "monitor": "flat", "strict": False}
        configs = [by_epoch, by_value]
        return [optimizer], configs

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.log("flat", 1.0)
        return super().training_step(batch, index)


def test_schedulers_that_follow_no_steps_are_lightnings():
    rates = []
    for callbacks in ([GAFCallback(gaf.GAF(tau=0.0))], []):
        _, run = fit_module(callbacks, ByEpoch(), limit_train_batches=2 * K)
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] < 0.1 / 4


class Keeps(Module):
    """One optimizer for every fit, and an exception in one of its first steps."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.optimizer = where, SGD(self.net.parameters())

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.fail("before the step")

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == K + 3:
            self.fail("in a macro-batch")
        return super().training_step(batch, index)

    def fail(self, where: str) -> None:
        if self.where == where:
            self.where = ""
            raise ZeroDivisionError


@pytest.mark.parametrize("where", ["in a macro-batch", "before the step"])
def test_after_an_exception_the_same_optimizer_fits_again(where):
    ends = []
    for policy in (gaf.GAF(tau=2), None):
        module = Keeps(where)
        kept = None if policy is None else GAFCallback(policy)
        callbacks = [] if policy is None else [kept]
        with pytest.raises(ZeroDivisionError) as caught:
            fit_module(callbacks, module)
        assert "zero_grad" not in vars(module.optimizer)
        if where == "before the step" and kept is not None:
            assert kept.decider.stats()["stepped"] == 0
        module.optimizer.step()  # nobody stands in the way, though `kept` and `caught` live on
        module.net.load_state_dict(network().state_dict())
        module.optimizer.state.clear()
        fit_module(
            [] if policy is None else [GAFCallback(policy)], module, limit_train_batches=7 * K
        )
        ends.append(flat(module))
        assert caught.value is not None
    assert near(*ends)


def test_a_run_resumed_in_the_middle_of_an_epoch_is_lightnings(tmp_path):
    ends = []
    for folder, policy in (("filtered", gaf.GAF(tau=2)), ("plain", None)):
        keep = ModelCheckpoint(
            tmp_path / folder, every_n_train_steps=3, save_top_k=-1, monitor=None, filename="{step}"
        )
        made = [[] if policy is None else [GAFCallback(policy)] for _ in range(2)]
        fit_module([*made[0], keep], epochs=1, limit_train_batches=7 * K)
        module, run = fit_module(
            made[1],
            epochs=1,
            limit_train_batches=7 * K,
            ckpt_path=tmp_path / folder / "step=3.ckpt",
        )
        ends.append(flat(module))
        assert run.global_step == 7
    assert near(*ends)


def in_float16(callbacks: Any, scale: float) -> tuple[Tensor, torch.amp.GradScaler, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    options = {
        "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        "limit_train_batches": 7 * K,
        "gradient_clip_val": 0.2,
    }
    module, run = fit_module(callbacks, **options)
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
    _, run = fit_module([GAFCallback(gaf.GAF(tau=0.0))], module)
    assert torch.equal(flat(module), before)
    assert run.optimizers[0].state_dict()["state"] == {}
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 0
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1
    assert run.global_step == 16


@pytest.mark.parametrize("policy", [partial(gaf.GAF, tau=TAU), partial(gaf.RandomSkip, 0.5)])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(tmp_path, policy):
    kept = GAFCallback(policy())
    whole, _ = fit_module([kept], epochs=4)
    fit_module([GAFCallback(policy()), ModelCheckpoint(tmp_path, save_last=True)], epochs=2)
    again = GAFCallback(policy())
    resumed, _ = fit_module([again], epochs=4, ckpt_path=tmp_path / "last.ckpt")
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
    fit_module([callback], Stopped())
    assert callback.decider.stats()["micro_gradients"] == 2 * K


def test_a_macro_batch_without_losses_decides_nothing():
    class Silent(Module):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            return None if index < K else super().training_step(batch, index)

    callback = GAFCallback(gaf.GAF(tau=2))
    fit_module([callback], Silent(), epochs=1)
    assert callback.decider.stats()["steps"] == 7


def test_the_trainers_logger_shows_agreement_at_every_step(tmp_path):
    callback = GAFCallback(gaf.GAF(tau=TAU), b=BATCH)
    _, run = fit_module([callback], logger=CSVLogger(tmp_path, name="", version=""), epochs=2)
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

    module, _ = fit_module([GAFCallback(gaf.GAF(tau=0.0), bn="accepted")], Normed())
    assert torch.equal(module.net[1].running_mean, torch.zeros(31))


def test_what_stands_in_for_the_strategy_goes_when_fit_ends_or_fails():
    class Broken(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise ZeroDivisionError

    _, run = fit_module([GAFCallback(gaf.GAF(tau=TAU))], epochs=1)
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


class NotTorchs:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, *args: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scheduled(Module):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.net.parameters())
        return [optimizer], [{"scheduler": NotTorchs(optimizer), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Fixed(Module):
    def configure_optimizers(self) -> None:
        return None


class Elsewhere(SingleDeviceStrategy):
    pass


class OwnPrecision(Precision):
    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        return optimizer.step(closure)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (ByHand, {}, r".* must use automatic optimization; .* is False. There use gaf.Accumulator"),
        (
            Own,
            {},
            r".* the backward pass is the Accumulator's; Own has a backward\(\) of its own. Leave",
        ),
        (Seldom, {}, r".* interval='step' must have frequency 1, .* got 3. Put the frequency into"),
        (
            Scheduled,
            {},
            r".* interval='step' must be a torch.* it can pause .* got test_lightning.NotTorchs.",
        ),
        (
            Fixed,
            {},
            r"configure_optimizers must return an optimizer; got None, so there is no step",
        ),
        (
            Module,
            {"strategy": Elsewhere("cpu")},
            r".*strategy must be lightning.pytorch's DDP or a single device; got test_lightning.E",
        ),
        (
            Module,
            {"plugins": [OwnPrecision()]},
            r".* plugin test_lightning.OwnPrecision has its own. Use one",
        ),
    ],
)
def test_what_would_go_past_the_decision_is_refused(module, options, message):
    with pytest.raises((TypeError, ValueError), match=f"GAFCallback: {message}"):
        fit_module([GAFCallback(gaf.GAF(tau=TAU))], module(), k=1, **options)


def test_several_callbacks_are_refused():
    with pytest.raises(ValueError, match="GAFCallback: there must be one; the Trainer has several"):
        fit_module([GAFCallback(gaf.GAF(tau=TAU)), Again(gaf.GAF(tau=TAU))])


class Again(GAFCallback):
    pass


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [GAFCallback, GAFDDPStrategy])
@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (0.97, {}, r"policy must be a callable .* got 0.97. Use gaf.GAF\(tau=0.97\)"),
        (gaf.GAF, {}, r"policy must be a callable .* got <class 'gaf\..*GAF'>"),
        (gaf.GAF(), {"b": 0}, r"b must be a number of samples per row, above 0; got 0."),
        (gaf.GAF(), {"b": "20"}, r"b must be a number of samples per row, above 0; got '20'."),
    ],
)
def test_a_wrong_argument_is_refused_when_it_is_given(make, given, options, message):
    with pytest.raises((TypeError, ValueError), match=f"GAFCallback: {message}"):
        make(given, **options)


def test_an_unknown_option_is_refused_when_it_is_given():
    message = (
        r".* one of gaf.Accumulator's in one process \(bn, leave_out\) .* got 'tau'. Leave it out."
    )
    with pytest.raises(TypeError, match=f"GAFCallback: an option {message}"):
        GAFCallback(gaf.GAF(), tau=0.9)


def test_an_option_of_ranks_is_refused_on_one_device():
    message = r"where micro-batches are the rows, .* got 'micro_group', .* Leave it out, or start"
    with pytest.raises(TypeError, match=f"GAFCallback: {message}"):
        fit_module([GAFCallback(gaf.GAF(), micro_group=2)])


@pytest.mark.usefixtures("unchecked")
def test_numpy_numbers_are_numbers():
    callback = GAFCallback(gaf.GAF(tau=2), b=np.int64(20))
    fit_module([callback], epochs=1)
    assert callback.b == 20.0


def test_fabrics_model_and_optimizer_are_taken_as_the_bare_ones():
    """In one process; `acc.backward` takes the place of `fabric.backward`."""
    ends = []
    for wrap in (True, False):
        model = nn.Sequential(network(), nn.BatchNorm1d(5))
        optimizer = SGD(model.parameters())
        if wrap:
            made = Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
        wrapped, stepped = made if wrap else (model, optimizer)
        acc = gaf.Accumulator(stepped, gaf.GAF(tau=TAU), model=wrapped, bn="accepted")
        for i, (x, y) in enumerate(
            zip(*(part.split(BATCH) for part in samples(SAMPLES)), strict=True)
        ):
            acc.backward(cross_entropy(wrapped(x), y))
            if i % K == K - 1:
                acc.step()
        ends.append((flat(model), model[1].running_mean, acc.stats()))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2] and 0 < ends[0][2]["stepped"] < ends[0][2]["steps"]


# ---------------------------------------------------------------------------------------- two ranks


def on_a_rank(
    policy: Any, way: str, ckpt_path: str | None = None, save: str | None = None, **options: Any
) -> dict[str, Any]:
    callback = None if policy is None else GAFCallback(policy)
    strategy: Any = "ddp"
    if way == "strategy":
        strategy = GAFDDPStrategy(policy)
        callback = strategy.callback
    callbacks = [callback] if way != "strategy" and callback is not None else []
    keep = [ModelCheckpoint(save, save_last=True)] if save else []
    options = {
        "k": 2,
        "devices": 2,
        "strategy": strategy,
        "plugins": [LightningEnvironment()],
    } | options
    run = trainer([*callbacks, *keep], **options)
    module = {"closure": ClosureAlone}.get(way, Module)()
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
    for policy in (gaf.Guard(), gaf.Mean(measure_every=2)):
        watched = ranks_of(pair, policy, "callback")
        assert torch.equal(watched["weights"], plain["weights"])
        assert -1 < watched["stats"]["cosine_mean"] < 1


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
    assert nearly_same(resumed["stats"], whole["stats"])


@pytest.mark.distributed
def test_ranks_whose_gradients_are_cleared_before_a_step_are_lightnings(pair):
    filtered, plain = (ranks_of(pair, policy, "closure") for policy in (gaf.GAF(tau=2), None))
    assert near(filtered["weights"], plain["weights"])
    assert not near(filtered["weights"], flat(network()))


def bn_on_a_rank() -> None:
    callbacks = [GAFCallback(gaf.GAF(), bn="accepted")]
    run = trainer(callbacks, devices=2, strategy="ddp", plugins=[LightningEnvironment()])
    message = r"where ranks are the rows, .* got 'bn', .* Leave it out, or train on one device."
    with pytest.raises(TypeError, match=f"GAFCallback: {message}"):
        run.fit(Module())


@pytest.mark.distributed
def test_an_option_of_one_device_is_refused_among_ranks(pair):
    pair.run(bn_on_a_rank)


def overflowing_on_a_rank(policy: Any) -> tuple[int, int, float]:
    """float16, first scale too large: Lightning's own schedule would move with every batch."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler), LightningEnvironment()]
    run = trainer(
        [GAFCallback(policy)],
        k=1,
        devices=2,
        epochs=1,
        strategy="ddp",
        plugins=plugins,
        limit_train_batches=20,
    )
    run.fit(Module())
    return run.lr_scheduler_configs[0].scheduler.last_epoch, run.global_step, scaler.get_scale()


@pytest.mark.distributed
@pytest.mark.parametrize("policy", [gaf.GAF(tau=2), gaf.Mean()], ids=["GAF", "Mean"])
def test_a_schedule_stands_still_on_overflows_among_ranks(pair, policy):
    (moved, steps, scale), other = pair.run(overflowing_on_a_rank, policy)
    assert (moved, steps, scale) == other
    assert steps == 20 and 0 < math.log2(2.0**20 / scale) == steps - moved < 20
