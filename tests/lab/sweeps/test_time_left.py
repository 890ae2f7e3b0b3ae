"""The time left of a sweep, by a fake clock: right within a factor of two after the first run."""

import pytest

from gaf_lab.settings.config import TrainConfig
from gaf_lab.sweeps.time_left import Expected, TimeLeft, run_kind

TICK = 0.2  # seconds between the reports of a run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(expected, true_seconds, workers, start=0.3, download=0.0, clock=None):
    """Runs the plan in the clock's time.

    Yields the estimate and the number of finished runs at each tick.
    """
    clock = clock or Clock()
    time_left = TimeLeft(expected, clock)
    waiting, running, done = list(true_seconds), {}, 0
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            time_left.start(name)
            running[name] = clock.now + start + (0 if done else download)
        clock.now += TICK
        for name, begun in list(running.items()):
            if clock.now < begun:
                continue
            share = (clock.now - begun) / true_seconds[name]
            time_left.progress(name, min(share, 1.0))
            if share >= 1:
                time_left.finish(name, true_seconds[name])
                del running[name]
                done += 1
        yield clock.now, time_left.left(), done


def assert_within_a_factor_of_two(ticks, least_seconds=2.0):
    """The estimate at every tick after the first finished run, until the end is near."""
    ticks = list(ticks)
    end = ticks[-1][0]
    checked = 0
    for now, left, done in ticks:
        if done and end - now > least_seconds:
            assert left is not None
            assert (end - now) / 2 <= left <= (end - now) * 2, (now, left, end - now)
            checked += 1
    assert checked


@pytest.mark.parametrize("wrong", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("download", [0.0, 30.0])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_one_kind_of_run_is_right_however_wrong_the_expectation(wrong, download, workers):
    true = {f"run-{i}": 20.0 for i in range(9)}
    expected = {name: Expected("mlp", wrong * seconds) for name, seconds in true.items()}
    assert_within_a_factor_of_two(simulate(expected, true, workers, download=download))


@pytest.mark.parametrize("wrong", [0.2, 5.0])
def test_runs_of_very_different_costs_are_right(wrong):
    true = {f"{kind}-{i}": s for i in range(3) for kind, s in (("mlp", 4.0), ("resnet", 200.0))}
    expected = {name: Expected(name.split("-")[0], wrong * s) for name, s in true.items()}
    assert_within_a_factor_of_two(simulate(expected, true, workers=2))


def test_an_expectation_that_is_wrong_for_one_kind_alone_is_corrected_while_it_runs():
    true = {f"{kind}-{i}": 40.0 for i in range(4) for kind in ("a", "b")}
    wrong = {"a": 0.25, "b": 4.0}
    expected = {name: Expected(name[0], wrong[name[0]] * s) for name, s in true.items()}
    assert_within_a_factor_of_two(simulate(expected, true, workers=2))


def test_runs_of_a_second_are_right_though_their_start_takes_as_long():
    true = {f"run-{i}": 1.0 for i in range(40)}
    expected = {name: Expected("mlp", 5.0) for name in true}
    ticks = list(simulate(expected, true, workers=2, start=1.0))
    end = ticks[-1][0]
    later = [(now, left) for now, left, done in ticks if done > 3 and end - now > 2]
    assert all((end - now) / 2 <= left <= 2 * (end - now) for now, left in later)


def test_finished_runs_of_an_earlier_sweep_count_from_the_start():
    time_left = TimeLeft({name: Expected("mlp", 1.0) for name in "abcd"}, Clock())
    time_left.finish("a", 10.0)
    assert time_left.left() == 30.0


def test_without_any_sign_there_is_no_estimate():
    time_left = TimeLeft({name: Expected("mlp", 1.0) for name in "ab"}, Clock())
    assert time_left.left() is None
    time_left.start("a")
    time_left.progress("a", 0.0)
    assert time_left.left() is None


def test_a_run_in_progress_shows_its_speed_without_its_start():
    clock = Clock()
    time_left = TimeLeft({name: Expected("mlp", 1.0) for name in "ab"}, clock)
    time_left.start("a")
    clock.now = 60.0  # a download
    time_left.progress("a", 0.0)
    clock.now = 70.0
    time_left.progress("a", 0.5)
    assert time_left.left() == pytest.approx(10 + 20)


def test_a_run_that_resumes_shows_the_speed_of_what_it_does_now():
    clock = Clock()
    time_left = TimeLeft({"a": Expected("mlp", 1.0)}, clock)
    time_left.start("a")
    time_left.progress("a", 0.5)
    clock.now = 10.0
    time_left.progress("a", 0.75)
    assert time_left.left() == pytest.approx(10.0)


def test_a_failed_run_takes_no_more_time():
    time_left = TimeLeft({name: Expected("mlp", 1.0) for name in "abc"}, Clock())
    time_left.finish("a", 10.0)
    time_left.start("b")
    time_left.fail("b")
    assert time_left.left() == 10.0


def test_networks_and_batches_are_kinds_and_policies_are_not():
    assert run_kind(TrainConfig(policy="mean")) == run_kind(TrainConfig())
    assert run_kind(TrainConfig(model="convnet")) != run_kind(TrainConfig())
    assert run_kind(TrainConfig(b=40)) != run_kind(TrainConfig())
