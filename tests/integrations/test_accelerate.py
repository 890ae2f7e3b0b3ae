"""Accelerate against a loop by hand and itself unfiltered, in one process and on two ranks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import gaf
from gaf.integrations.trackers import metrics
from helpers.comparing import same
from helpers.oracle import (
    BATCH,
    STEPS,
    K,
    close,
    flat,
    follow,
    mean_loss,
    nearly_same,
    network,
    samples,
)
from helpers.ranks import Ranks

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from gaf.integrations.accelerate import attach

TAU = 0.85  # some steps are taken, some are not


@pytest.fixture(autouse=True)
def _fresh() -> None:
    AcceleratorState._reset_state(True)


class Loop:
    """The loop of Accelerate's documentation; `policy` adds the one line."""

    def __init__(
        self,
        policy: Any = None,
        k: int = K,
        count: int = STEPS * K * BATCH,
        clip: float = float("inf"),
        decay: float = 0.97,
        **options: Any,
    ) -> None:
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k, **options)
        self.clip, model = clip, network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        parts = (
            model,
            optimizer,
            DataLoader(TensorDataset(*samples(count)), batch_size=BATCH),
            StepLR(optimizer, 1, decay),
        )
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(*parts)
        self.handle: Any = (
            None if policy is None else attach(self.accelerator, self.model, self.optimizer, policy)
        )
        self.taken: list[bool] = []

    def run(self, start: int = 0, stop: int | None = None) -> "Loop":
        """Some of the epoch's batches."""
        for batch in list(self.loader)[start:stop]:
            self.micro(batch)
        return self

    def whole(self) -> "Loop":
        for batch in self.loader:
            self.micro(batch)
        return self

    def micro(self, batch: Any) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(mean_loss(self.model, batch))
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.taken.append(not self.accelerator.optimizer_step_was_skipped)
            self.scheduler.step()
            self.optimizer.zero_grad()

    def state(self) -> Any:
        states = (self.optimizer.state_dict(), self.scheduler.state_dict())
        return copy.deepcopy((flat(self.model), *states))


def by_hand(
    policy: Any, count: int, clip: float = float("inf"), loss: Any = mean_loss
) -> tuple[Any, Any, list[bool]]:
    """The same in one process: each batch is a row."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = StepLR(optimizer, 1, 0.97)
    batches = list(DataLoader(TensorDataset(*samples(count)), batch_size=BATCH))
    steps = [[[batch] for batch in batches[i : i + K]] for i in range(0, len(batches), K)]
    taken = follow(model, optimizer, scheduler, steps, policy, clip, loss)
    return model, scheduler, taken


# -------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "policy", [gaf.GAF(TAU), gaf.GAF(TAU, start="best"), gaf.GAF(2.0)], ids=["first", "best", "all"]
)
@pytest.mark.parametrize("clip", [float("inf"), 0.4])
def test_micro_batches_are_rows_and_the_last_macro_batch_may_be_short(policy, clip):
    count = (STEPS * K + 2) * BATCH
    loop = Loop(policy, count=count, clip=clip).whole()
    model, scheduler, taken = by_hand(policy, count, clip)
    close(loop.model, model)
    assert loop.taken == taken and len(taken) == STEPS + 1
    assert loop.scheduler.get_last_lr() == scheduler.get_last_lr()
    assert policy.tau == 2 or set(taken) == {True, False}


def test_all_rows_are_what_accelerate_does():
    close(Loop(gaf.GAF(2.0)).whole().model, Loop().whole().model)


def test_a_skip_leaves_parameters_optimizer_and_schedule_bitwise_alone():
    loop = Loop(gaf.GAF(2.0)).run(stop=2 * K)
    before = loop.state()
    assert loop.taken == [True, True] and before[1]["state"]
    loop.handle.policy = gaf.GAF(0.0)
    loop.run(2 * K, 4 * K)
    assert loop.taken[2:] == [False, False] and loop.handle.stats()["steps"] == 4
    assert same(loop.state(), before)
    loop.handle.policy = gaf.GAF(2.0)
    loop.run(4 * K, 5 * K)
    assert loop.taken[-1] and loop.scheduler.scheduler.last_epoch == 3


def test_bf16_autocast():
    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[0])
        return torch.nn.functional.cross_entropy(out.float(), batch[1])

    loop = Loop(gaf.GAF(TAU), mixed_precision="bf16", clip=0.4).whole()
    model, _, taken = by_hand(gaf.GAF(TAU), STEPS * K * BATCH, 0.4, loss)
    assert loop.taken == taken and set(taken) == {True, False}
    close(loop.model, model)
    # rounding is there to be seen
    assert (flat(model) - flat(by_hand(gaf.GAF(TAU), STEPS * K * BATCH, 0.4)[0])).norm() > 1e-4


def scaled_loop(policy: Any, **options: Any) -> Loop:
    """Accelerate makes a GradScaler on accelerators only; here one of the CPU's, in its place."""
    AcceleratorState._reset_state(True)
    made = Accelerator.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.scaler, self.native_amp = GradScaler("cpu", init_scale=2.0**10), True
        self.state._mixed_precision = "fp16"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "__init__", init)
        patch.setattr(
            "accelerate.accelerator.get_mixed_precision_context_manager",
            lambda *args: torch.autocast("cpu", torch.bfloat16),
        )
        return Loop(policy, **options)


@pytest.mark.parametrize("clip", [None, 0.4])
def test_a_grad_scaler_changes_nothing_but_an_overflow_steps_nowhere(clip):
    with_scaler, without = (
        scaled_loop(gaf.GAF(TAU), clip=clip or 1e9),
        Loop(gaf.GAF(TAU), mixed_precision="bf16", clip=clip or 1e9),
    )
    assert with_scaler.accelerator.scaler.is_enabled() and with_scaler.handle.scaler is not None
    assert with_scaler.whole().taken == without.whole().taken
    close(with_scaler.model, without.model)

    before, scale = with_scaler.state(), with_scaler.accelerator.scaler.get_scale()
    x, y = samples(BATCH)
    for factor in (1.0, 1.0, float("inf"), 1.0):
        with_scaler.micro((x * factor, y))
    assert same(with_scaler.state(), before) and not with_scaler.taken[-1]
    assert with_scaler.accelerator.scaler.get_scale() == scale / 2


def run_and_resume(folder: Path, make: Any) -> tuple[Loop, Loop]:
    """One undisturbed run, and one that was saved half way and resumed as in a new process."""
    half, end = STEPS // 2 * K, STEPS * K
    undisturbed = make().run(stop=end)
    first = make().run(stop=half)
    first.accelerator.save_state(folder)
    second = make()
    second.accelerator.load_state(folder)
    return undisturbed, second.run(half, end)


@pytest.mark.parametrize(
    "make",
    [lambda: gaf.GAF(TAU), lambda: gaf.GAF(gaf.QuantileTau(0.4)), lambda: gaf.RandomSkip(0.5)],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, make):
    undisturbed, second = run_and_resume(tmp_path, lambda: Loop(make()))
    assert same(second.state(), undisturbed.state())
    # as text, where NaN is NaN
    assert str(second.handle.state_dict()) == str(undisturbed.handle.state_dict())
    assert second.handle.stats()["steps"] == STEPS > second.handle.stats()["stepped"] > 0


def test_a_checkpoint_within_a_macro_batch_is_refused(tmp_path):
    loop = Loop(gaf.GAF(TAU)).run(stop=K + 1)
    with pytest.raises(
        RuntimeError,
        match=r"state_dict\(\) must come between macro-batches; .* Call step\(\) first",
    ):
        loop.accelerator.save_state(tmp_path)


def test_accelerates_tracker_shows_what_was_decided(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = Loop(gaf.GAF(TAU), log_with="tensorboard", project_dir=tmp_path)
    loop.accelerator.init_trackers("run")
    for step, _ in enumerate(range(STEPS)):
        loop.run(step * K, (step + 1) * K)
        loop.accelerator.log(metrics(loop.handle, b=BATCH), step=step)
    loop.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    last = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert last == pytest.approx(metrics(loop.handle, b=BATCH), rel=1e-6)  # kept in float32
    assert last["gaf/skipped"] == loop.taken.count(False) > 0


def test_detached_it_is_accelerate_again():
    loop, plain = Loop(gaf.GAF(TAU)), Loop()
    loop.handle.detach()
    assert same(loop.whole().state(), plain.whole().state()) and loop.handle.stats()["steps"] == 0
    assert type(loop.optimizer) is AcceleratedOptimizer and loop.accelerator._custom_objects == []
    attach(loop.accelerator, loop.model, loop.optimizer, gaf.GAF(TAU))


def test_one_row_is_warned_of():
    loop = Loop(gaf.GAF(TAU), k=1)
    with pytest.warns(UserWarning, match="One micro-gradient has nothing to agree with"):
        loop.run(stop=1)


def test_several_optimizers_share_one_decision():
    one = Loop(gaf.GAF(TAU), decay=1.0).whole()

    AcceleratorState._reset_state(True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=K), network()
    made = [
        torch.optim.SGD(part.parameters(), lr=0.3, momentum=0.9) for part in (model[0], model[2])
    ]
    model, *optimizers = accelerator.prepare(model, *made)
    handle = attach(accelerator, model, optimizers, gaf.GAF(TAU))
    for batch in DataLoader(TensorDataset(*samples(STEPS * K * BATCH)), batch_size=BATCH):
        with accelerator.accumulate(model):
            accelerator.backward(mean_loss(model, batch))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert handle.stats() == one.handle.stats()
    assert torch.equal(flat(model), flat(one.model))


def test_what_cannot_work_is_refused(unchecked):
    AcceleratorState._reset_state(True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=K), network()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.3) for part in (model[0], model[2]))
    with pytest.raises(
        TypeError,
        match=r"optimizer must be what accelerator.prepare gave; got SGD. Attach after prepare.",
    ):
        attach(accelerator, model, first, gaf.GAF())
    model, first, second = accelerator.prepare(model, first, second)
    with pytest.raises(
        ValueError,
        match=r"every prepared optimizer must be given, .*; missing: SGD. Give them all as a list.",
    ):
        attach(accelerator, model, first, gaf.GAF())
    attach(accelerator, model, [first, second], gaf.GAF())
    with pytest.raises(RuntimeError, match=r"must not be attached already; it is. Call detach\(\)"):
        attach(accelerator, model, [first, second], gaf.GAF())


@pytest.mark.parametrize(
    "kind",
    [
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
        DistributedType.MEGATRON_LM,
        DistributedType.XLA,
    ],
)
def test_engines_that_reduce_by_themselves_are_refused(kind, monkeypatch):
    loop = Loop()
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(
        TypeError, match=f"got Sequential under .*{kind.value}.* choose plain data parallelism"
    ):
        attach(loop.accelerator, loop.model, loop.optimizer, gaf.GAF())


def test_a_loop_that_bypasses_it_is_refused():
    loop = Loop(gaf.GAF(TAU))
    mean_loss(loop.model, samples(BATCH)).backward()
    with pytest.raises(
        RuntimeError,
        match=r"every loss must go through accelerator.backward\(loss\); a step came, and none",
    ):
        loop.optimizer.step()

    loop = Loop(gaf.GAF(2.0), k=1)
    with pytest.warns(UserWarning, match="One micro-gradient"):
        loop.accelerator.backward(mean_loss(loop.model, samples(BATCH)))
    with pytest.raises(
        RuntimeError,
        match=r"p.grad must be empty when a macro-batch begins; .* optimizer.zero_grad\(\) after",
    ):
        loop.accelerator.backward(mean_loss(loop.model, samples(BATCH)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"create_graph": True},
            r"got create_graph. .* a gradient penalty take torch.autograd.grad\(",
        ),
        ({"gradient": torch.ones(())}, r"got gradient. Give a scalar loss: \(loss \* gradient\)"),
        (
            {"inputs": [torch.ones(2)]},
            r"got inputs. Freeze the parameters that are to get no gradient with",
        ),
        ({"learning_rate": 0.1}, r"got learning_rate. An optimizer that steps in the .* \(LOMO\)"),
        ({"scale_wrt_gas": True}, r"got scale_wrt_gas. Leave it out."),
    ],
)
def test_other_options_of_backward_are_refused_and_leave_no_trace(options, message):
    loop, plain = Loop(gaf.GAF(2.0)), Loop()
    with pytest.raises(TypeError, match=f"accelerate.attach: in one process .* at most; {message}"):
        loop.accelerator.backward(mean_loss(loop.model, samples(BATCH)), **options)
    close(loop.run(stop=K).model, plain.run(stop=K).model)


def test_options_of_backward_that_change_nothing_are_taken_and_a_graph_can_be_kept():
    loop = Loop(gaf.GAF(2.0), k=2)
    loss = mean_loss(loop.model, samples(BATCH))
    for retain_graph in (True, None):
        with loop.accelerator.accumulate(loop.model):
            loop.accelerator.backward(
                loss, retain_graph=retain_graph, create_graph=False, inputs=None
            )
            loop.optimizer.step()
    assert loop.handle.last.distances.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert loop.handle.stats()["accepted"] == 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [1.0, [torch.ones(())], {"loss": torch.ones(())}, None])
def test_a_loss_that_is_no_tensor_is_refused(loss):
    loop = Loop(gaf.GAF(2.0))
    message = f"be given the loss as a tensor; got {type(loss).__name__}. Give it one scalar."
    with pytest.raises(TypeError, match=message):
        loop.accelerator.backward(loss)


def test_a_second_loss_after_the_decision_is_refused_also_after_a_skip():
    """A skip leaves p.grad empty: without a refusal the loss would be a macro-batch of its own."""
    loop = Loop(gaf.GAF(0.0)).run(stop=K - 1)
    batch = list(loop.loader)[K - 1]
    message = (
        r"must end with optimizer.step\(\); .* once more after the decision. Add up the losses"
    )
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(mean_loss(loop.model, batch))
        with pytest.raises(RuntimeError, match=message):
            loop.accelerator.backward(mean_loss(loop.model, batch))
    assert loop.handle.stats()["steps"] == 1


def test_a_step_on_gradients_from_elsewhere_is_refused_also_later():
    loop = Loop(gaf.GAF(2.0)).run(stop=K)
    mean_loss(loop.model, samples(BATCH)).backward()
    with pytest.raises(
        RuntimeError, match=r"every loss must go through accelerator.backward\(loss\)"
    ):
        loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.optimizer.step()  # on nothing
    assert loop.run(K, 2 * K).handle.stats()["stepped"] == 2


def run_with_clearing(policy: Any) -> Loop:
    """A loop that clears the gradients of its second macro-batch, and takes no step there."""
    loop = Loop(policy)
    for number, batch in enumerate(list(loop.loader)[: 4 * K]):
        if number == 2 * K - 1:
            with loop.accelerator.accumulate(loop.model):
                loop.optimizer.zero_grad()
        else:
            loop.micro(batch)
    return loop


def test_gradients_that_are_cleared_before_a_step_count_for_nothing():
    loop = run_with_clearing(gaf.GAF(2.0))
    close(loop.model, run_with_clearing(None).model)
    assert loop.handle.stats()["micro_gradients"] == 3 * K


def test_detached_within_a_macro_batch_it_is_accelerate_again():
    loop, plain = Loop(gaf.GAF(TAU)).run(stop=2), Loop()
    loop.handle.detach()
    batches = list(loop.loader)
    for each in (loop, plain):
        each.accelerator.step = 0
        for batch in batches[:K]:
            each.micro(batch)
    assert same(loop.state(), plain.state())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": 0.97}, r"policy must be a callable .* got 0.97. Use gaf.GAF\(tau=0.97\)"),
        ({"accelerator": None}, r".* must be accelerate's Accelerator; got NoneType. Call attach"),
        ({"model": None}, r"the model must be a module, .*; got NoneType. Call attach"),
        ({"optimizer": None}, r"the optimizer must be what .*; got NoneType. Call attach"),
        (
            {"micro_group": 2},
            r"where micro-batches are the rows, .* got 'micro_group', .* start several",
        ),
        ({"tau": 0.9}, r".* in one process \(bn, leave_out\) .* got 'tau'. Leave it out."),
    ],
)
def test_a_wrong_argument_is_refused(changes, message):
    loop = Loop()
    given = {
        "accelerator": loop.accelerator,
        "model": loop.model,
        "optimizer": loop.optimizer,
        "policy": gaf.GAF(),
    }
    with pytest.raises(TypeError, match=f"accelerate.attach: {message}"):
        attach(**(given | changes))
    assert same(loop.run(stop=K).state(), Loop().run(stop=K).state())


# ---------------------------------------------------------------------------------------- two ranks


def on_a_rank(
    tau: float | gaf.Guard | gaf.Mean | None,
    clip: float = float("inf"),
    half: str = "",
    **options: Any,
) -> tuple[Any, list[bool], Any]:
    """Weights, steps and telemetry of a rank's loop over its half of the batches, K for a step.

    tau: of GAF; or another policy.
    """
    policy = gaf.GAF(tau) if isinstance(tau, float) else tau
    loop = Loop(policy, clip=clip, count=2 * STEPS * K * BATCH, **options)
    assert (
        loop.accelerator.num_processes == 2
        and loop.accelerator.distributed_type == DistributedType.MULTI_CPU
    )
    if half:
        middle = STEPS // 2 * K
        loop.run(stop=middle).accelerator.save_state(half)
        loop.accelerator.wait_for_everyone()
        loop = Loop(policy, clip=clip, count=2 * STEPS * K * BATCH, **options)
        loop.accelerator.load_state(half)
        loop.run(middle, STEPS * K)
    else:
        loop.whole()
    known = (
        None if loop.handle is None else (loop.handle.state_dict(), loop.handle.stats()["steps"])
    )
    return (
        (flat(loop.model), loop.optimizer.state_dict(), loop.scheduler.state_dict()),
        loop.taken,
        known,
    )


def test_ranks_are_rows_and_what_a_rank_accumulates_is_its_row(pair: Ranks):
    (state, taken, known), other = pair.run(on_a_rank, TAU, 0.4)
    assert same(state, other[0]) and taken == other[1] and known == other[2]

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = StepLR(optimizer, 1, 0.97)
    batches = list(DataLoader(TensorDataset(*samples(2 * STEPS * K * BATCH)), batch_size=BATCH))
    steps = [
        [batches[i : i + 2 * K : 2], batches[i + 1 : i + 2 * K : 2]]
        for i in range(0, len(batches), 2 * K)
    ]
    # Accelerate: once for each process
    expected = follow(model, optimizer, scheduler, steps, gaf.GAF(TAU), clip=0.4, advance=2)
    assert taken == expected and set(taken) == {True, False} and known[1] == STEPS
    assert (state[0] - flat(model)).norm() <= 1e-6 * flat(model).norm()
    assert state[2]["last_epoch"] == scheduler.last_epoch == 2 * taken.count(True)


def test_all_ranks_are_what_accelerate_does(pair: Ranks):
    """Bit for bit under Guard and Mean."""
    filtered, plain = pair.run(on_a_rank, 2.0)[0], pair.run(on_a_rank, None)[0]
    assert (filtered[0][0] - plain[0][0]).norm() <= 1e-6 * plain[0][0].norm()
    assert filtered[0][2] == plain[0][2]
    for policy in (gaf.Guard(), gaf.Mean(measure_every=2)):
        watched = pair.run(on_a_rank, policy)[0]
        assert torch.equal(watched[0][0], plain[0][0]) and watched[0][2] == plain[0][2]


def test_resumed_ranks_end_with_the_weights_of_undisturbed_ones_bit_for_bit(pair: Ranks, tmp_path):
    (state, _, known), (again, _, known_again) = (
        pair.run(on_a_rank, TAU)[0],
        pair.run(on_a_rank, TAU, float("inf"), str(tmp_path))[0],
    )
    assert same(state, again) and nearly_same(known, known_again)


def overflow_on_a_rank() -> tuple[list[bool], float, bool]:
    """bf16 with a scaler, and one rank's batch overflows.

    Returns the steps, the scale, and whether all else stood still.
    """
    loop = scaled_loop(gaf.GAF(TAU), clip=0.4, count=2 * STEPS * K * BATCH).whole()
    taken, before, scale = list(loop.taken), loop.state(), loop.accelerator.scaler.get_scale()
    x, y = samples(BATCH)
    for step in range(K):
        hit = step == 1 and loop.accelerator.process_index == 1
        loop.micro((x * float("inf") if hit else x, y))
    return taken, loop.accelerator.scaler.get_scale() / scale, same(loop.state(), before)


def test_a_grad_scaler_on_ranks(pair: Ranks):
    taken, fell, still = pair.run(overflow_on_a_rank)[0]
    assert taken == pair.run(on_bf16)[0] and set(taken) == {True, False}
    assert fell == 0.5 and still


def on_bf16() -> list[bool]:
    return (
        Loop(gaf.GAF(TAU), clip=0.4, count=2 * STEPS * K * BATCH, mixed_precision="bf16")
        .whole()
        .taken
    )


def sync_each_batch() -> None:
    AcceleratorState._reset_state(True)
    plugin = GradientAccumulationPlugin(num_steps=K, sync_each_batch=True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_plugin=plugin), network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
    with pytest.raises(ValueError, match="in several processes sync_each_batch must be False"):
        attach(accelerator, model, optimizer, gaf.GAF())


def test_sync_each_batch_is_refused_on_ranks(pair: Ranks):
    pair.run(sync_each_batch)


def bn_on_a_rank() -> None:
    loop = Loop()
    message = r"where ranks are the rows, .* got 'bn', which gaf.Accumulator has. Leave it out"
    with pytest.raises(TypeError, match=f"accelerate.attach: {message}"):
        attach(loop.accelerator, loop.model, loop.optimizer, gaf.GAF(), bn="accepted")


def test_an_option_of_one_process_is_refused_on_ranks(pair: Ranks):
    pair.run(bn_on_a_rank)
