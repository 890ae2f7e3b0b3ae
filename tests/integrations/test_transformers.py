"""The Trainer against a loop by hand and itself unfiltered, in one process and on two ranks."""

import copy
import json
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import gaf
from gaf.integrations.trackers import metrics
from helpers.comparing import same
from helpers.oracle import BATCH, STEPS, K, close, flat, follow, network, samples
from helpers.ranks import Ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gaf.integrations.transformers import GAFMixin, GAFTrainer  # noqa: E402

TAU = 0.92  # some steps are taken, some are not


class Model(torch.nn.Module):
    """What the Trainer asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits.float(), labels), "logits": logits}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"x": x, "labels": y} for x, y in zip(*samples(count), strict=True)]


class Skips(TrainerCallback):
    """Which steps were taken."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.trainer: Any = None

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.taken.append(not self.trainer.accelerator.optimizer_step_was_skipped)


def trainer(
    folder: Any,
    policy: Any = None,
    kind: Any = GAFTrainer,
    model: Any = None,
    data: Any = None,
    k: int = K,
    steps: int = STEPS,
    **options: Any,
) -> Any:
    AcceleratorState._reset_state(True)
    common = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": -1,
    }
    usual = {
        "learning_rate": 0.3,
        "max_grad_norm": 0.4,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    }
    shape = {
        "gradient_accumulation_steps": k,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
    }
    args = TrainingArguments(str(folder), **(common | usual | shape | options))
    seen = Skips()
    parts = {
        "model": model or Model(),
        "args": args,
        "train_dataset": data or rows_of(steps * k * BATCH),
        "callbacks": [seen],
    }
    made = Trainer(**parts) if policy is None else kind(**parts, gaf_policy=policy)
    seen.trainer = made
    return made, seen.taken


def by_hand(
    policy: Any, count: int, loss: Any = None, ranks: int = 1
) -> tuple[Any, Any, list[bool]]:
    """In one process each batch is a row; on ranks, K batches of each."""
    x, y = samples(count)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    if ranks == 1:
        steps = [[[batch] for batch in batches[i : i + K]] for i in range(0, len(batches), K)]
    else:
        steps = [
            [batches[i + r : i + ranks * K : ranks] for r in range(ranks)]
            for i in range(0, len(batches), ranks * K)
        ]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    taken = follow(
        model, optimizer, scheduler, steps, policy, 0.4, **({} if loss is None else {"loss": loss})
    )
    return model, scheduler, taken


# -------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "policy", [gaf.GAF(TAU), gaf.GAF(TAU, start="best"), gaf.GAF(2.0)], ids=["first", "best", "all"]
)
def test_micro_batches_are_rows_and_the_last_macro_batch_may_be_short(policy, tmp_path):
    count = (STEPS * K + 2) * BATCH
    hf, taken = trainer(tmp_path, policy, data=rows_of(count))
    hf.train()
    model, scheduler, expected = by_hand(policy, count)
    close(hf.model, model)
    assert taken == expected and len(taken) == STEPS + 1
    assert hf.lr_scheduler.get_last_lr()[0] == pytest.approx(scheduler.get_last_lr()[0])
    assert policy.tau == 2 or set(taken) == {True, False}


class Words:
    """A tiny GPT-2 with dropout, on texts of different lengths, which weight micro-batches."""

    @staticmethod
    def model() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=23,
                n_positions=16,
                n_embd=16,
                n_layer=1,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    @staticmethod
    def data(count: int) -> list[dict[str, Any]]:
        rng = torch.Generator().manual_seed(3)
        ids = torch.randint(1, 23, (count, 12), generator=rng)
        lengths = torch.randint(3, 13, (count, 1), generator=rng)
        labels = torch.where(torch.arange(12) < lengths, ids, -100)
        return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


ADAM = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-2}


def words(folder: Any, policy: Any, steps: int = STEPS, **options: Any) -> Any:
    count = steps * K * BATCH
    made, taken = trainer(
        folder, policy, model=Words.model(), data=Words.data(count), **(ADAM | options)
    )
    assert made.model_accepts_loss_kwargs
    return made, taken


def test_all_rows_are_what_the_trainer_does_also_where_it_weights_by_tokens(tmp_path):
    models, losses = [], []
    # one after the other: the Trainer seeds dropout when it is made
    for policy in (gaf.GAF(2.0), None):
        made, _ = words(tmp_path, policy)
        losses.append(made.train().training_loss)
        models.append(flat(made.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Adam divides by a gradient's own size, so that coordinates near 0 carry their rounding on
    assert (models[0] - models[1]).norm() <= 1e-5 * models[1].norm()


class Switch(TrainerCallback):
    """From step 2 on nothing agrees enough."""

    def __init__(self, made: Any) -> None:
        self.made, self.states = made, []

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.made.gaf.policy = gaf.GAF(0.0)
        parts = (
            flat(self.made.model),
            self.made.optimizer.state_dict(),
            self.made.lr_scheduler.state_dict(),
        )
        self.states.append(copy.deepcopy(parts))


def test_a_skip_leaves_parameters_optimizer_and_schedule_bitwise_alone(tmp_path):
    made, taken = words(tmp_path, gaf.GAF(2.0), steps=4)
    switch = Switch(made)
    made.add_callback(switch)
    made.train()
    first, before, *after = switch.states
    assert taken == [True, True, False, False] and made.state.global_step == 4
    assert not same(first, before) and all(same(each, before) for each in after)


@pytest.mark.parametrize(
    "make",
    [lambda: gaf.GAF(0.99), lambda: gaf.GAF(gaf.QuantileTau(0.4)), lambda: gaf.RandomSkip(0.5)],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(make, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    undisturbed, _ = words(tmp_path, make(), **saving)
    undisturbed.train()
    second, _ = words(tmp_path / "elsewhere", make(), **saving)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert torch.equal(flat(second.model), flat(undisturbed.model))
    assert same(second.optimizer.state_dict(), undisturbed.optimizer.state_dict())
    assert same(second.lr_scheduler.state_dict(), undisturbed.lr_scheduler.state_dict())
    # as text, where NaN is NaN
    assert str(second.gaf.state_dict()) == str(undisturbed.gaf.state_dict())
    assert second.gaf.stats()["steps"] == STEPS > second.gaf.stats()["stepped"] > 0


def test_bf16_autocast(tmp_path):
    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(batch[0]).float(), batch[1])

    made, taken = trainer(tmp_path, gaf.GAF(TAU), bf16=True)
    made.train()
    model, _, expected = by_hand(gaf.GAF(TAU), STEPS * K * BATCH, loss)
    assert taken == expected and set(taken) == {True, False}
    close(made.model, model)


def test_the_trainers_own_log_shows_what_was_decided(tmp_path):
    made, taken = trainer(tmp_path, gaf.GAF(TAU), report_to="tensorboard")
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == STEPS and [log["gaf/skipped"] for log in logs] == [
        taken[: i + 1].count(False) for i in range(STEPS)
    ]
    assert {k: v for k, v in logs[-1].items() if k.startswith("gaf/")} == metrics(made.gaf, b=BATCH)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = tmp_path.glob("runs/*")
    shown = EventAccumulator(str(run)).Reload().Scalars("train/gaf/skipped")
    assert [event.value for event in shown] == [log["gaf/skipped"] for log in logs]
    assert not any("gaf/skipped" in log for log in made.state.log_history if "loss" not in log)


def test_training_again_attaches_anew_and_the_accelerator_is_given_back(tmp_path):
    made, taken = trainer(tmp_path, gaf.GAF(TAU))
    made.train()
    first = made.gaf
    assert "backward" not in vars(made.accelerator)
    made.train()
    assert (
        made.gaf is not first
        and made.gaf.stats()["steps"] == first.stats()["steps"] == STEPS
        and len(taken) == 2 * STEPS
    )


class Stop(TrainerCallback):
    """Breaks the epoch off within a macro-batch, and has it saved."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True


def test_an_epoch_broken_off_within_a_macro_batch_is_saved_as_of_its_last_step(tmp_path):
    made, _ = trainer(tmp_path, gaf.GAF(TAU))
    made.add_callback(Stop())
    made.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "gaf.pt", weights_only=True)
    assert (
        saved["telemetry"]["totals"]["steps"]
        == 2
        == json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"]
    )


def test_the_mixin_serves_subclasses(tmp_path):
    class Mixed(GAFMixin, Seq2SeqTrainer):
        pass

    AcceleratorState._reset_state(True)
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        gradient_accumulation_steps=K,
        max_steps=2,
        disable_tqdm=True,
    )
    made = Mixed(
        model=Model(),
        args=args,
        train_dataset=rows_of(2 * K * 8),
        gaf_policy=gaf.GAF(2.0),
        gaf_options={"bn": "accepted"},
    )
    made.train()
    assert made.gaf.stats()["steps"] == made.gaf.stats()["stepped"] == 2


def test_a_training_step_that_bypasses_it_is_refused(tmp_path):
    class Past(GAFTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    with pytest.raises(
        RuntimeError, match=r"every loss must go through accelerator.backward\(loss\)"
    ):
        trainer(tmp_path, gaf.GAF(TAU), kind=Past)[0].train()


def test_one_row_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="One micro-gradient has nothing to agree with"):
        trainer(tmp_path, gaf.GAF(TAU), k=1, steps=1)[0].train()


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.0}, {"max_grad_norm": 0.01}, {"bf16": True}], ids=str
)
def test_all_rows_are_what_the_trainer_does_under_its_options(tmp_path, options):
    models = []
    for policy in (gaf.GAF(2.0), None):
        made, _ = trainer(tmp_path, policy, **options)
        made.train()
        models.append(made.model)
    close(*models)


def test_another_number_of_micro_batches_in_the_next_training_is_the_trainers(tmp_path):
    models = []
    for policy in (gaf.GAF(2.0), None):
        made, _ = trainer(tmp_path, policy, steps=4)
        made.train()
        made.args.gradient_accumulation_steps = 2
        made.train()
        models.append(made.model)
        if policy is not None:
            assert made.gaf.stats()["steps"] == 8 and made.gaf.stats()["micro_gradients"] == 16
    close(*models)


class Breaks(TrainerCallback):
    """Once, within a macro-batch or between decision and step."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.fail("in a macro-batch")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.fail("before the step")

    def fail(self, where: str) -> None:
        if self.where == where:
            self.where = ""
            raise ZeroDivisionError


@pytest.mark.parametrize("where", ["in a macro-batch", "before the step"])
def test_after_an_exception_the_same_trainer_trains_again(tmp_path, where):
    models = []
    for policy in (gaf.GAF(2.0), None):
        made, _ = trainer(tmp_path, policy, steps=4)
        made.add_callback(Breaks(where))
        with pytest.raises(ZeroDivisionError) as caught:
            made.train()
        made.train()
        assert caught.value is not None
        models.append(made.model)
    close(*models)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (0.97, None, r"policy must be a callable .* got 0.97. Use gaf.GAF\(tau=0.97\)"),
        (gaf.GAF(), 0.9, r"options must be a dictionary of names and values; got 0.9."),
        (
            gaf.GAF(),
            {"tau": 0.9},
            r".* must be one of gaf.Accumulator's .* got 'tau'. Leave it out.",
        ),
        (
            gaf.GAF(),
            {"micro_group": 2},
            r".* micro-batches are the rows, .* got 'micro_group', .* Leave it out",
        ),
    ],
)
def test_a_wrong_argument_is_refused_when_it_is_given(tmp_path, policy, options, message):
    AcceleratorState._reset_state(True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match=f"GAFTrainer: {message}"):
        GAFTrainer(
            model=Model(),
            args=args,
            train_dataset=rows_of(4),
            gaf_policy=policy,
            gaf_options=options,
        )


# ---------------------------------------------------------------------------------------- two ranks


def on_a_rank(
    folder: str, tau: float | gaf.Guard | gaf.Mean | None, half: bool = False
) -> tuple[Any, list[bool], Any]:
    """tau: of GAF; or another policy."""
    policy = gaf.GAF(tau) if isinstance(tau, float) else tau
    made, taken = trainer(
        folder, policy, steps=2 * STEPS, save_strategy="steps", save_steps=STEPS // 2
    )
    assert made.args.world_size == 2
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}" if half else None)
    known = None if policy is None else (str(made.gaf.state_dict()), made.state.log_history[-2])
    return (
        (flat(made.model), made.optimizer.state_dict(), made.lr_scheduler.state_dict()),
        taken,
        known,
    )


def test_ranks_are_rows_and_what_a_rank_accumulates_is_its_row(pair: Ranks, tmp_path):
    results = pair.run(on_a_rank, str(tmp_path), TAU)
    (state, taken, known), other = results
    assert same(state, other[0]) and taken == other[1] and known[0] == other[2][0]
    model, scheduler, expected = by_hand(gaf.GAF(TAU), 2 * STEPS * K * BATCH, ranks=2)
    assert taken == expected and set(taken) == {True, False}
    assert (state[0] - flat(model)).norm() <= 1e-6 * flat(model).norm()
    assert state[2]["last_epoch"] == scheduler.last_epoch == taken.count(True)
    assert known[1]["gaf/skipped"] == taken.count(False)

    again, _, known_again = pair.run(on_a_rank, str(tmp_path), TAU, True)[0]
    assert same(state, again) and known[0] == known_again[0]


def test_all_ranks_are_what_the_trainer_does(pair: Ranks, tmp_path):
    """Bit for bit under Guard and Mean, whose numbers of each worker are in the log."""
    filtered, plain = (pair.run(on_a_rank, str(tmp_path), tau)[0][0] for tau in (2.0, None))
    assert (filtered[0] - plain[0]).norm() <= 1e-6 * plain[0].norm() and filtered[2] == plain[2]
    for policy in (gaf.Guard(), gaf.Mean(measure_every=2)):
        watched, _, known = pair.run(on_a_rank, str(tmp_path), policy)[0]
        assert torch.equal(watched[0], plain[0]) and watched[2] == plain[2]
        names = ("cosine_mean", "worker/0/norm", "worker/1/cosine")
        assert {f"gaf/{name}" for name in names} <= known[1].keys()
        assert known[1].get("gaf/alarms", 0) == 0
