"""What users give: numpy's numbers are numbers, and errors name what they refuse and the fix."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import gaf
from gaf.measure.result import Probe
from gaf.ranks.handle import Handle
from gaf.record.telemetry import Telemetry
from gaf.rules.sequential import Sequential, visit

pytestmark = pytest.mark.usefixtures("unchecked")
NUMBERS = [numpy.float64, numpy.float32, numpy.float16]
INTEGERS = [numpy.int64, numpy.int32, numpy.uint8]


def batches(n: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 6), torch.randint(0, 3, (5,))) for _ in range(n)]


def probe_of(r: int = 32, k: int = 4) -> Probe:
    rows = torch.randn(r, 50, dtype=torch.float64) + 0.3
    return Probe(10, k, rows @ rows.T, {"body.0": rows @ rows.T, "body.1": rows @ rows.T}, 0)


# --- numpy's numbers, and dictionaries


@pytest.mark.parametrize("number", NUMBERS)
def test_numpy_floats_are_numbers(number: Callable[[float], Any]) -> None:
    policy = gaf.GAF(number(0.5), max_norm_ratio=number(2.5))
    assert policy == gaf.GAF(0.5, max_norm_ratio=2.5)
    assert repr(policy) == repr(gaf.GAF(0.5, max_norm_ratio=2.5))  # compared among ranks
    assert gaf.RandomSkip(number(0.25)) == gaf.RandomSkip(0.25)
    for one, other in (
        (gaf.SignalTau(number(0.5), window=number(20)), gaf.SignalTau(0.5, window=20.0)),
        (gaf.NoiseFloorTau(number(2), initial=number(1.5)), gaf.NoiseFloorTau(2.0, initial=1.5)),
        (gaf.QuantileTau(number(0.5), half_life=number(8)), gaf.QuantileTau(0.5, half_life=8.0)),
        (gaf.MovingAverageTau(number(0.25), cap=number(0.5)), gaf.MovingAverageTau(0.25, cap=0.5)),
        (
            gaf.ScheduleTau([(number(0), number(1)), (number(8), number(0.5))]),
            gaf.ScheduleTau([(0, 1.0), (8, 0.5)]),
        ),
    ):
        assert repr(one) == repr(other)
    found = probe_of()
    assert found.predicted(number(0.5)) == found.predicted(0.5)
    assert found.measured(number(0.5)) == found.measured(0.5)
    assert found.recommend(number(0.5), chance=number(0.25)) == found.recommend(0.5, chance=0.25)
    rows = torch.randn(4, 6)
    assert gaf.reference(rows, number(0.5))[1] == gaf.reference(rows, 0.5)[1]


@pytest.mark.parametrize("integer", INTEGERS)
def test_numpy_integers_are_integers(integer: Callable[[int], Any]) -> None:
    policy = gaf.GAF(0.5, min_accepted=integer(3))
    assert (policy, repr(policy)) == (
        gaf.GAF(0.5, min_accepted=3),
        repr(gaf.GAF(0.5, min_accepted=3)),
    )
    one, other = gaf.RandomSkip(0.5, seed=integer(7)), gaf.RandomSkip(0.5, seed=7)
    assert [one.planned(t, 4) for t in range(20)] == [other.planned(t, 4) for t in range(20)]
    one.load_state_dict({"step": integer(5)})
    assert json.dumps(one.state_dict()) == '{"step": 5}'
    assert gaf.Audit(integer(3)).scores().shape == (3,)
    model, data = nn.Linear(6, 3), batches()
    found = gaf.probe(
        model, cross_entropy, data, k=integer(4), b=integer(5), rows=integer(16), slices=integer(2)
    )
    want = gaf.probe(model, cross_entropy, data, k=4, b=5, rows=16, slices=2)
    assert torch.equal(found.gram, want.gram)
    assert type(found.b) is type(found.k) is int
    assert torch.equal(found.merged(integer(2)).gram, want.merged(2).gram)
    assert found.predicted(0.9, integer(2)) == want.predicted(0.9, 2)
    rows = torch.randn(4, 6)
    assert gaf.reference(rows, 2.0, min_accepted=integer(3))[1] == [True] * 4
    telemetry = Telemetry()
    assert telemetry.stats(integer(8)).keys() == telemetry.stats(8).keys()


@pytest.mark.parametrize(
    "points",
    [
        {0: 1.0, 4: 0.5},
        {numpy.int64(0): 1, numpy.int64(4): numpy.float32(0.5)},
        numpy.array([[0.0, 1.0], [4.0, 0.5]]),
        ((step, tau) for step, tau in ((0, 1.0), (4, 0.5))),
        [[0, 1.0], [4, 0.5]],
    ],
    ids=["dictionary", "numpy's numbers", "array", "generator", "lists"],
)
def test_points_of_a_schedule_may_come_in_any_form(points: Any) -> None:
    policy = gaf.GAF(gaf.ScheduleTau(points))
    assert repr(policy.tau) == "ScheduleTau(points=[(0.0, 1.0), (4.0, 0.5)])"
    policy(torch.eye(3, dtype=torch.float64))
    assert float(policy.tau_on(torch.device("cpu"))) == 0.875


def test_an_audit_takes_members_in_any_form() -> None:
    _, decision = gaf.aggregate(torch.eye(2), gaf.GAF(0.5))
    forms = [
        [[0, 1], [2]],
        [numpy.array([0, 1]), numpy.array([2], dtype=numpy.uint8)],
        [torch.tensor([0, 1], dtype=torch.int16), torch.tensor(2)],
        ((0, 1), (numpy.int64(2),)),
        iter([[0, 1], [2]]),
    ]
    for members in forms:
        audit = gaf.Audit(3)
        audit.record(members, decision)
        assert audit.counts.tolist() == [1, 1, 1]


# --- refused

LEAST = "must be a whole number of at least"
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    *[
        (
            lambda tau=tau: gaf.GAF(tau),
            ValueError,
            r"GAF: tau is a cosine distance and must lie in \[0, 2\].* got " + seen,
        )
        for tau, seen in (
            ("0.9", "'0.9'"),
            (None, "None"),
            (math.nan, "nan"),
            (True, "True"),
            ([0.9], r"\[0.9\]"),
            (1 + 0j, r"\(1\+0j\)"),
            (numpy.bool_(True), "(np.)?True"),
            ("Auto", "'Auto'"),
        )
    ],
    (lambda: gaf.GAF(torch.tensor(0.9)), ValueError, r"got tensor\(0.9\d*\). Give tau.item\(\)."),
    (lambda: gaf.GAF(gaf.SignalTau), ValueError, r"SignalTau'>. Call it: gaf.SignalTau\(\)."),
    *[
        (
            lambda least=least: gaf.GAF(0.5, min_accepted=least),
            ValueError,
            f"GAF: min_accepted {LEAST} 1; got .*The paper uses 2",
        )
        for least in (True, 2.0, "2", None, numpy.float64(2), torch.tensor(2))
    ],
    *[
        (
            lambda ratio=ratio: gaf.GAF(0.5, max_norm_ratio=ratio),
            ValueError,
            "GAF: max_norm_ratio must be None or a number of at least 1; got",
        )
        for ratio in (True, "3", math.nan, 0.5, torch.tensor(3.0))
    ],
    (
        lambda: gaf.GAF(0.5, start=["first"]),
        ValueError,
        r"GAF: start must be one of 'first', 'best', 'worst'; got \['first'\]",
    ),
    (
        lambda: gaf.GAF(0.5, average=None),
        ValueError,
        "GAF: average must be one of 'mean', 'halving'; got None",
    ),
    (
        lambda: gaf.GAF(0.5, scope="layers"),
        ValueError,
        "GAF: scope must be one of 'all', 'group', 'layer'; got 'layers'",
    ),
    *[
        (
            lambda p=p: gaf.RandomSkip(p),
            ValueError,
            r"RandomSkip: step_probability must lie in \[0, 1\]; got .*Give the share",
        )
        for p in ("x", None, True, math.nan, 1.5, torch.tensor(0.5))
    ],
    *[
        (
            lambda seed=seed: gaf.RandomSkip(0.5, seed=seed),
            ValueError,
            "RandomSkip: seed must be a whole number; got .*0 is the default",
        )
        for seed in (1.5, "a", None, True)
    ],
    *[
        (
            lambda value=value: gaf.SignalTau(value),
            ValueError,
            "SignalTau: kappa must be a number of at least 0; got .*Leave it out",
        )
        for value in ("1", True, math.inf, math.nan, torch.tensor(1.0))
    ],
    *[
        (
            lambda points=points: gaf.ScheduleTau(points),
            ValueError,
            r"ScheduleTau: points must be \(step, tau\) pairs whose steps rise",
        )
        for points in (
            None,
            3,
            "x",
            [1, 2],
            [(0,)],
            [(0, 1.0, 2)],
            {},
            [("0", 1.0)],
            [(math.nan, 1.0)],
            [(0, 1.0), (math.inf, 0.5)],
            [(True, 1.0)],
            {5: 1.0, 0: 0.5},
            [(-1, 1.0)],
        )
    ],
    (
        lambda: gaf.ScheduleTau({0: "1"}),
        ValueError,
        "ScheduleTau: tau must be a number of at least 0 and at most 2; got '1'",
    ),
    *[
        (
            lambda n=n: gaf.Audit(n),
            ValueError,
            f"Audit: n {LEAST} 1; got .*It is the number of samples",
        )
        for n in (0, 2.0, "3", None, True, math.nan)
    ],
    (lambda: gaf.reference([[1.0]], 0.5), TypeError, "rows must be a .* got list. Use torch.stack"),
    *[
        (
            lambda tau=tau: gaf.reference(torch.eye(2), tau),
            ValueError,
            "reference: tau must be a number of at least 0 and at most 2; got",
        )
        for tau in ("auto", None, gaf.SignalTau(), 3.0, True)
    ],
    (
        lambda: gaf.reference(torch.eye(2), 0.5, "median"),
        ValueError,
        "reference: average must be one of 'mean', 'halving'; got 'median'",
    ),
    (
        lambda: gaf.reference(torch.eye(2), 0.5, min_accepted=0),
        ValueError,
        f"reference: min_accepted {LEAST} 1; got 0",
    ),
    (
        lambda: gaf.aggregate(torch.eye(2), gaf.GAF),
        TypeError,
        "aggregate: policy must be a callable",
    ),
    *[
        (
            lambda b=b: Telemetry().stats(b),
            ValueError,
            "stats: b must be a number above 0; got .*It counts the samples",
        )
        for b in (0, -1, "8", None, True, math.nan)
    ],
    (
        lambda: Telemetry().load_state_dict({"totals": {}}),
        ValueError,
        r"the state of the counts must hold .*; got \['totals'\]",
    ),
    (
        lambda: Telemetry().load_state_dict(None),
        ValueError,
        "the state of the counts must hold .*; got None",
    ),
    # the probe
    (
        lambda: gaf.probe(None, cross_entropy, batches()),
        TypeError,
        "probe: model must be a torch.nn.Module; got NoneType",
    ),
    (
        lambda: gaf.probe(nn.Linear, cross_entropy, batches()),
        TypeError,
        "probe: model must be a torch.nn.Module; got type",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), "mse", batches()),
        TypeError,
        "probe: loss_fn must be a function .* got 'mse'",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), nn.CrossEntropyLoss, batches()),
        TypeError,
        r"loss_fn must be .* or torch.nn.CrossEntropyLoss\(\)",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, None),
        TypeError,
        "probe: micro_batches must be an iterable .* got NoneType",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, []),
        ValueError,
        "micro_batches must give at least 16.* got 0. An iterator gives",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, used_up()),
        ValueError,
        "got 0. An iterator gives its micro-batches once",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, [(x, y, y) for x, y in batches()], b=5),
        TypeError,
        r"a pair \(x, y\) or a mapping; got tuple of 3",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, [x for x, _ in batches()], b=5),
        TypeError,
        r"a pair \(x, y\) or a mapping; got Tensor",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), lambda s, y: s.detach().sum(), batches()),
        TypeError,
        "the loss must depend on parameters",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), lambda s, y: 0.5, batches()),
        TypeError,
        "loss_fn must return the mean loss .* got float",
    ),
    (
        lambda: gaf.probe(nn.LazyLinear(3), cross_entropy, batches()),
        TypeError,
        "'weight' waits for the first forward pass. Run one",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3, dtype=torch.complex64), cross_entropy, batches()),
        TypeError,
        "must be real; 'weight' is torch.complex64",
    ),
    *[
        (
            lambda k=k: gaf.probe(nn.Linear(6, 3), cross_entropy, batches(), k=k),
            ValueError,
            f"probe: k {LEAST} 2; got",
        )
        for k in (True, 4.0, "4", None)
    ],
    *[
        (
            lambda b=b: gaf.probe(nn.Linear(6, 3), cross_entropy, batches(), b=b),
            ValueError,
            f"probe: b {LEAST} 1; got .*It counts the samples",
        )
        for b in (0, 2.5, "5", True)
    ],
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, batches(), slices=1.0),
        ValueError,
        f"probe: slices {LEAST} 1; got 1.0",
    ),
    (
        lambda: gaf.probe(nn.Linear(6, 3), cross_entropy, batches(), rows="all"),
        ValueError,
        f"probe: rows {LEAST} 16; got 'all'",
    ),
    (
        lambda: probe_of().distances("body.2"),
        ValueError,
        "Probe: layer must be the name of one of the 2 modules .* got 'body.2'. "
        "Near it are 'body.1', 'body.0'",
    ),
    (
        lambda: probe_of().noise_in("head"),
        ValueError,
        "Probe: layer must be the name of one of the 2 modules .* got 'head'",
    ),
    (lambda: probe_of().noise_in(3), ValueError, "Probe: layer must be the name .* got 3"),
    *[
        (
            lambda call=call, tau=tau: getattr(probe_of(), call)(tau),
            ValueError,
            f"{call}: tau must be a number of at least 0 and at most 2; got",
        )
        for call in ("predicted", "measured")
        for tau in ("0.9", None, 2.5, math.nan, True)
    ],
    *[
        (lambda m=m: probe_of().merged(m), ValueError, f"merged: m {LEAST} 1; got")
        for m in (0, 1.0, "2", True)
    ],
    *[
        (
            lambda share=share: probe_of().recommend(share),
            ValueError,
            r"recommend: share must lie in \(0, 1\); got .*The default is 0.5",
        )
        for share in ("0.5", None, math.nan, True, 1)
    ],
]


def used_up() -> Any:
    iterator = iter(batches())
    list(iterator)
    return iterator


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_cannot_be_used_is_told_by_name(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


def test_a_data_parallel_model_within_the_model_is_refused() -> None:
    class FullyShardedDataParallel(nn.Linear):
        """Stands in for torch's, which needs a process group."""

    with pytest.raises(TypeError, match="got FullyShardedDataParallel, which averages gradients"):
        gaf.probe(nn.Sequential(FullyShardedDataParallel(6, 3)), cross_entropy, batches())


# --- audits


def recorded() -> tuple[gaf.Audit, gaf.Decision]:
    _, decision = gaf.aggregate(torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]), gaf.GAF(0.5))
    audit = gaf.Audit(4)
    audit.record([[0], [1], [2]], decision)
    return audit, decision


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([[0], [1], [9]], r"members must lie in \[0, 4\); got 9. Give the n"),
        ([[0], [1], [-1]], "got -1. Give the n"),
        ([[0], [1], [1.5]], "must be whole numbers; got torch.float32"),
        ([[0], [1], [True]], "must be whole numbers; got torch.bool"),
        ([[0], [1], [1j]], "must be whole numbers; got torch.complex64"),
        ([[0], [1], "x"], "must be whole numbers; got 'x'"),
        ([[0], [1], [[0], [1, 2]]], "must be whole numbers; got "),
        ([[0], [1]], "members for each of the 3 micro-gradients that were measured; got 2"),
        (torch.tensor([[0], [1]]), "members for each of the 3 .* got 2"),
        (7, "members must be k integer tensors or lists, or one tensor of k rows; got 7"),
        (torch.tensor(7), "members must be k integer tensors or lists"),
        (None, "members must be k integer tensors or lists, or one tensor of k rows; got None"),
    ],
)
def test_a_refused_record_counts_nothing(members: Any, message: str) -> None:
    audit, decision = recorded()
    before = audit.state_dict()
    with pytest.raises(ValueError, match=message):
        audit.record(members, decision)
    after = audit.state_dict()
    assert torch.equal(after["sums"], before["sums"])
    assert torch.equal(after["counts"], before["counts"])
    assert after["recent"] == before["recent"]
    again, _ = recorded()
    audit.record([[3], [0], [1]], decision)
    again.record([[3], [0], [1]], decision)
    assert torch.equal(audit.scores(), again.scores())


@pytest.mark.parametrize("decision", [None, 3, [0.1, 0.2], torch.zeros(3)])
def test_an_audit_asks_for_a_decision(decision: Any) -> None:
    with pytest.raises(
        TypeError, match=r"decision must be a gaf.Decision or an Outcome; got .*acc.step\(\)"
    ):
        gaf.Audit(3).record([[0], [1], [2]], decision)


@pytest.mark.parametrize("state", [None, {}, {"sums": torch.zeros(3)}])
def test_an_audits_state_is_told_by_name(state: Any) -> None:
    with pytest.raises(ValueError, match="Audit: the state must hold sums, counts and recent; got"):
        gaf.Audit(3).load_state_dict(state)


# --- decisions of another form

K = 4
ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
RIGHT: dict[str, Any] = {
    "weights": torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64),
    "accepted": torch.tensor([True, True, False, False]),
    "stepped": torch.tensor(True),
    "distances": torch.zeros(K, dtype=torch.float64),
}
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    *[
        (name, RIGHT[name][:2], ValueError, rf"one {one} for each of the 4 rows; got shape \(2,\)")
        for name, one in (
            ("weights", "weight"),
            ("accepted", "accepted"),
            ("distances", "distance"),
        )
    ],
    *[
        (name, RIGHT[name][0], ValueError, rf"one {one} for each of the 4 rows; got shape \(\)")
        for name, one in (
            ("weights", "weight"),
            ("accepted", "accepted"),
            ("distances", "distance"),
        )
    ],
    (
        "distances",
        torch.empty(0),
        ValueError,
        r"one distance for each of the 4 rows; got shape \(0,\)",
    ),
    ("weights", torch.zeros(1, K), ValueError, r"got shape \(1, 4\) of torch.float32"),
    (
        "stepped",
        torch.tensor([True]),
        ValueError,
        r"one stepped for all rows together, of shape \(\); got shape \(1,\)",
    ),
    ("stepped", torch.tensor(1), ValueError, "in bool .* one stepped .* of torch.int64"),
    ("accepted", torch.ones(K), ValueError, "in bool .* one accepted .* of torch.float32"),
    (
        "weights",
        torch.ones(K, dtype=torch.int64),
        ValueError,
        "in float64 .* one weight .* of torch.int64",
    ),
    (
        "weights",
        torch.ones(K, dtype=torch.complex128),
        ValueError,
        "in float64 .* one weight .* of torch.complex128",
    ),
    (
        "distances",
        torch.zeros(K, dtype=torch.bool),
        ValueError,
        "in float64 .* one distance .* of torch.bool",
    ),
    (
        "weights",
        torch.zeros(K, device="meta"),
        ValueError,
        "on the Gram matrix's device cpu, one weight .* on meta",
    ),
    (
        "stepped",
        torch.zeros((), dtype=torch.bool, device="meta"),
        ValueError,
        "device cpu, one stepped .* on meta",
    ),
    (
        "weights",
        [0.5, 0.5, 0.0, 0.0],
        TypeError,
        "must return a gaf.Decision of tensors, or k weights .*; got",
    ),
    ("stepped", True, TypeError, "must return a gaf.Decision of tensors, or k weights .*; got"),
    ("distances", None, TypeError, "must return a gaf.Decision of tensors, or k weights .*; got"),
]


class Own(Sequential):
    """Rows stream by; its verdict is what it was given."""

    def __init__(self, decision: Any) -> None:
        self.decision = decision

    def visit(self, count: Tensor, inner: Tensor, norm2: Tensor, own: Tensor) -> Any:
        return visit(count, inner, norm2, own, 2.0)

    def conclude(self, accepted: Tensor, distances: Tensor) -> Any:
        return self.decision

    def __repr__(self) -> str:
        return "Own()"


def through_aggregate(decision: Any) -> None:
    gaf.aggregate(ROWS, lambda gram: decision)


def through_accumulator(decision: Any) -> None:
    accumulated(lambda gram: decision)


def through_streamed_rows(decision: Any) -> None:
    accumulated(Own(decision))


def accumulated(policy: Any) -> None:
    p = nn.Parameter(torch.zeros(3))
    acc = gaf.Accumulator(SGD([p], 1.0), policy)
    for row in ROWS:
        acc.backward((p * row).sum())
    acc.step()


def through_attach(decision: Any) -> None:
    """Every engine of gaf.attach asks its Handle."""
    p = nn.Parameter(torch.zeros(3))
    handle = Handle([SGD([p], 1.0)], lambda gram: decision, None, K, [p])
    handle.begin()
    handle.decide(gaf.gram(ROWS), [p])


ENGINES = [through_aggregate, through_accumulator, through_streamed_rows, through_attach]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_a_decision_of_another_form_is_told_by_its_field(
    engine: Callable[[Any], None], name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        engine(gaf.Decision(**(RIGHT | {name: value})))
    assert str(caught.value).startswith("policy ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("engine", [through_accumulator, through_attach], ids=lambda f: f.__name__)
def test_weights_that_are_not_finite_are_refused_where_they_would_be_stepped_on(
    engine: Callable[[Any], None], bad: float
) -> None:
    weights = torch.tensor([bad, 0.5, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="a Decision that steps must have finite weights; got"):
        engine(gaf.Decision(**(RIGHT | {"weights": weights})))
    engine(gaf.Decision(**(RIGHT | {"weights": weights, "stepped": torch.tensor(False)})))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [None, 0.5, [1.0] * K, (RIGHT["weights"], True)])
def test_what_is_no_decision_is_told(engine: Callable[[Any], None], value: Any) -> None:
    with pytest.raises(
        TypeError, match="policy .*: it must return a gaf.Decision of tensors, .*; got"
    ):
        engine(value)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda f: f.__name__)
def test_a_decision_of_the_right_form_passes_also_in_float32(
    engine: Callable[[Any], None],
) -> None:
    engine(gaf.Decision(**RIGHT))
    single = {name: RIGHT[name].float() for name in ("weights", "distances")}
    engine(gaf.Decision(**(RIGHT | single)))


# --- states of another policy


def states() -> dict[str, Any]:
    policies = [
        gaf.GAF(0.9),
        gaf.GAF(gaf.SignalTau()),
        gaf.GAF(gaf.QuantileTau()),
        gaf.RandomSkip(0.5),
    ]
    return {repr(p): p.state_dict() for p in policies} | {
        "none": {},
        "no state": None,
        "a list": [1],
    }


@pytest.mark.parametrize(
    ("make", "allowed"),
    [
        (lambda: gaf.GAF(0.9), {"GAF(tau=0.9", "GAF(tau=SignalTau", "GAF(tau=QuantileTau", "none"}),
        (lambda: gaf.GAF(gaf.SignalTau()), {"GAF(tau=0.9", "GAF(tau=SignalTau", "none"}),
        (lambda: gaf.RandomSkip(0.5), {"RandomSkip"}),
    ],
    ids=["a number", "a threshold", "RandomSkip"],
)
@pytest.mark.parametrize("name", states())
def test_the_state_of_another_policy_is_refused_by_name(
    make: Callable[[], Any], allowed: set[str], name: str
) -> None:
    policy, state = make(), states()[name]
    if any(name.startswith(one) for one in allowed):
        policy.load_state_dict(state)
        return
    with pytest.raises(
        ValueError,
        match=r"(GAF|RandomSkip|SignalTau): the state must be of .*Build the policy as it was",
    ):
        policy.load_state_dict(state)


def test_an_accumulator_and_a_handle_refuse_another_policys_state() -> None:
    def acc(policy: Any) -> gaf.Accumulator:
        return gaf.Accumulator(SGD([nn.Parameter(torch.zeros(3))], 1.0), policy)

    def handle(policy: Any) -> Handle:
        return Handle([SGD([nn.Parameter(torch.zeros(3))], 1.0)], policy, None, 2, [])

    for make in (acc, handle):
        with pytest.raises(ValueError, match="RandomSkip: the state must be .*; it holds nothing"):
            make(gaf.RandomSkip(0.5)).load_state_dict(make(gaf.GAF(0.9)).state_dict())
        with pytest.raises(ValueError, match=r"GAF: .* it holds \['step'\]"):
            make(gaf.GAF(0.9)).load_state_dict(make(gaf.RandomSkip(0.5)).state_dict())
