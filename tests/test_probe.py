"""The probe: its estimates against closed forms and known Sigma, its predictions against GAF.

And that it changes nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from gaf.measure.acceptance import measure_acceptance
from gaf.measure.probe import probe
from gaf.measure.result import Probe
from gaf.rules import prediction
from gaf.rules.agreement import dimension_of, noise_of
from gaf.rules.gram import gram_of
from gaf.rules.prediction import noise_floor, predicted_acceptance, tau_for


def spectrum(name: str) -> Tensor:
    """Eigenvalues of Sigma, of trace 1."""
    values = {
        "identity": torch.ones(200),
        "low rank": torch.cat([torch.ones(40), torch.zeros(360)]),
        "decaying": torch.arange(1, 401) ** -0.5,
    }
    return (values[name] / values[name].sum()).double()


SPECTRA = ("identity", "low rank", "decaying")


def gaussian(r: int, rho: float, eigenvalues: Tensor) -> Tensor:
    """r rows g + e with |g| = 1 and Cov(e) = rho diag(eigenvalues).

    g is of the noise's kind: g'Sigma g = tr(Sigma^2) / tr(Sigma).
    """
    signs = torch.randint(0, 2, eigenvalues.shape) * 2.0 - 1
    return eigenvalues.sqrt() * (
        signs + rho**0.5 * torch.randn(r, len(eigenvalues), dtype=torch.float64)
    )


def probe_of(rows: Tensor, k: int = 8, b: int = 10) -> Probe:
    return Probe(b, k, rows @ rows.T, {"all": rows @ rows.T}, 0)


# --- B and d_eff


def test_the_effective_dimension_is_the_mean_over_all_quadruples():
    gram = gaf.gram(torch.randn(7, 5, dtype=torch.float64))
    square = [
        (gram[a, c] - gram[a, d] - gram[b, c] + gram[b, d]) ** 2 / 4
        for a, b, c, d in itertools.permutations(range(7), 4)
    ]
    noise = gram.diagonal().mean() - (gram.sum() - gram.trace()) / 42
    assert dimension_of(gram) == pytest.approx(
        float(noise**2 / torch.stack(square).mean()), rel=1e-9
    )


def test_noise_that_is_orthogonal_gives_b_exactly():
    found = noise_of(
        2 * torch.ones(6, 6, dtype=torch.float64) + 6 * torch.eye(6, dtype=torch.float64), b=5
    )
    assert (found.signal, found.trace, found.scale) == pytest.approx((2, 30, 15))
    assert (found.low, found.high) == pytest.approx((15, 15))
    assert found.rho == pytest.approx(3)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rho", [1.0, 10.0])
def test_b_and_d_eff_are_those_of_the_known_covariance(name, rho):
    eigenvalues = spectrum(name)
    rows = gaussian(600, rho, eigenvalues)
    found = noise_of(rows @ rows.T, b=10)
    assert found.low < 10 * rho < found.high
    # unit rows: little of the noise along g is left, and equal lengths scatter a little less
    assert found.dimension == pytest.approx(float(1 / eigenvalues.square().sum()), rel=0.15)


def test_the_interval_holds_b_in_about_95_of_100_draws():
    eigenvalues = spectrum("identity")
    hits = 0
    for _ in range(200):
        rows = gaussian(40, 5.0, eigenvalues)
        found = noise_of(rows @ rows.T, b=1)
        hits += found.low <= 5 <= found.high
    assert 180 <= hits <= 199  # 95% of 200 is 190; its deviation 3


def test_a_few_rows_of_many_times_the_length_do_not_become_the_whole_dimension():
    rows = gaussian(200, 10.0, spectrum("identity"))
    before = noise_of(rows @ rows.T, b=1).dimension
    rows[::50] *= 20
    assert noise_of(rows @ rows.T, b=1).dimension == pytest.approx(before, rel=1e-9)


def test_absent_rows_take_no_part():
    rows = gaussian(20, 3.0, spectrum("identity"))
    expected = noise_of(rows @ rows.T, b=2)
    with_absent = torch.cat(
        [rows, torch.zeros(1, 200).double(), torch.full((1, 200), math.nan).double()]
    )
    assert noise_of(with_absent @ with_absent.T, b=2) == expected
    assert math.isnan(noise_of(torch.eye(3, dtype=torch.float64), b=2).scale)


# --- predictions


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("rho", "c"), [(1.0, 1), (10.0, 1), (10.0, 4), (100.0, 2)])
def test_mean_and_spread_of_the_cosine_with_a_sum(name, rho, c):
    eigenvalues = spectrum(name)
    rows = gaussian(3000 * (c + 1), rho, eigenvalues).view(3000, c + 1, -1)
    cosines = torch.cosine_similarity(rows[:, :c].sum(1), rows[:, c], dim=1)
    dimension = float(1 / eigenvalues.square().sum())
    # of order 1 / d_eff
    assert float(cosines.mean()) == pytest.approx(prediction.expected_cosine(rho, c), abs=0.02)
    assert float(cosines.std()) == pytest.approx(
        prediction.spread_of_cosine(rho, dimension, c), rel=0.1
    )


def test_the_cosine_of_pure_noise_scatters_by_the_root_of_the_dimension():
    assert prediction.spread_of_cosine(math.inf, 400.0, 1) == pytest.approx(0.05, rel=1e-4)
    assert 1 - prediction.expected_cosine(9.0, 1) == pytest.approx(9 / (1 + 9))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("rho", "tau", "k"), [(1.0, 0.5, 2), (3.0, 0.7, 8), (10.0, 0.85, 8), (100.0, 0.95, 4)]
)
@pytest.mark.usefixtures("unchecked")
def test_predicted_acceptance_is_what_gaf_accepts_of_normal_rows(name, rho, tau, k):
    eigenvalues = spectrum(name)
    rows = gaussian(1500, rho, eigenvalues)
    predicted = predicted_acceptance(tau, k, rho, float(1 / eigenvalues.square().sum()))
    # 0.02 are the draws'; the rest: cosines are not quite normal, and a step's rows share a start
    assert measure_acceptance(rows @ rows.T, k, tau).rows == pytest.approx(predicted, abs=0.05)


def test_predicted_acceptance_rises_with_tau_and_with_b_and_tau_for_inverts_it():
    shares = [predicted_acceptance(tau, 8, 5.0, 100.0) for tau in (0.0, 0.5, 0.7, 0.9, 2.0)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert predicted_acceptance(0.8, 8, 5.0, 100.0) < predicted_acceptance(0.8, 8, 2.0, 100.0)
    for share in (0.1, 0.5, 0.9):
        assert predicted_acceptance(tau_for(share, 8, 5.0, 100.0), 8, 5.0, 100.0) == pytest.approx(
            share, abs=1e-6
        )


def test_pure_noise_passes_the_noise_floor_as_often_as_asked_for():
    eigenvalues = spectrum("identity")
    e = torch.randn(2, 20_000, len(eigenvalues), dtype=torch.float64)
    passed = 1 - torch.cosine_similarity(e[0], e[1], dim=1) <= noise_floor(0.05, len(eigenvalues))
    assert float(passed.double().mean()) == pytest.approx(0.05, abs=0.006)  # 4 deviations


# --- acceptance, merging, advice


@pytest.mark.parametrize("tau", [0.6, 0.9, 2.0])
def test_measured_acceptance_is_gafs_own(tau):
    rows = gaussian(30, 4.0, spectrum("decaying"))
    gram, k = rows @ rows.T, 5
    chosen = torch.rand(60, 30, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]
    decisions = [gaf.GAF(tau)(gram[i][:, i]) for i in chosen]
    compared = [
        (gaf.GAF(tau, min_accepted=1)(gram[i][:, i]).accepted.sum() - 1) / (k - 1) for i in chosen
    ]
    found = measure_acceptance(gram, k, tau, draws=60)
    assert found.steps == pytest.approx(sum(bool(d.stepped) for d in decisions) / 60)
    assert found.rows == pytest.approx(float(sum(compared)) / 60)


def test_merged_is_the_probe_of_averaged_rows():
    rows = gaussian(50, 6.0, spectrum("identity"))
    merged = probe_of(rows, k=4).merged(3)
    averaged = rows[:48].view(16, 3, -1).mean(1)
    assert merged.gram.allclose(averaged @ averaged.T)
    assert merged.layers["all"].allclose(merged.gram)
    assert merged.b == 30
    with pytest.raises(
        ValueError, match=r"merged\(10\): 50 rows merged 10 at a time must leave at least 8.*got 5"
    ):
        probe_of(rows, k=4).merged(10)


@pytest.mark.parametrize(
    "call", [lambda p: p.merged(0), lambda p: p.predicted(0.9, m=0), lambda p: p.recommend(m=0)]
)
def test_no_rows_cannot_be_merged(call: Callable[[Any], Any]) -> None:
    with pytest.raises(
        ValueError, match="m must be a whole number of at least 1; got 0. It counts the rows"
    ):
        call(probe_of(torch.randn(24, 5).double(), k=4))


def test_predictions_for_larger_micro_batches_hold_on_merged_rows():
    found = probe_of(gaussian(1200, 12.0, spectrum("identity")), k=4)
    for m in (1, 2, 4):
        tau = found.recommend(share=0.4, m=m).tau
        measured = found.merged(m).measured(tau) if m > 1 else found.measured(tau)
        # 600 rows, 150 of those merged by four
        assert found.predicted(tau, m) == pytest.approx(measured.rows, abs=0.07)


def test_the_recommendation_is_the_lower_of_noise_floor_and_share():
    few, many = (
        probe_of(gaussian(256, 40.0, spectrum("identity"))),
        probe_of(gaussian(256, 1.0, spectrum("identity"))),
    )
    floor, half = few.recommend(), many.recommend()
    assert floor.tau == noise_floor(0.05, few.noise.dimension)
    assert "pure noise" in floor.reason
    assert floor.predicted < 0.5
    assert half.tau < noise_floor(0.05, many.noise.dimension)
    assert half.predicted == pytest.approx(0.5, abs=1e-6)
    assert "by more than noise would" in half.reason
    assert many.recommend(share=0.2).tau < half.tau
    for advice in (floor, half):
        assert abs(advice.predicted - advice.measured.rows) < 0.1


def test_where_nothing_is_in_common_the_advice_says_so_and_stays_at_the_floor():
    noise = torch.randn(64, 300, dtype=torch.float64)
    noise -= noise.mean(0)  # the mean product of two is then below zero
    found = probe_of(torch.cat([noise[:32] - noise[:32].mean(0), noise[32:]]))
    advice = found.recommend()
    assert math.isinf(found.noise.scale)
    assert "no common direction can be made out" in advice.reason
    assert advice.predicted == pytest.approx(0.05, abs=0.02)  # a sum of accepted rows is noise too


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"chance": -0.1}])
def test_recommend_refuses_what_is_no_share(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"recommend: {name} must lie in \(0, 1\)"):
        probe_of(gaussian(32, 1.0, spectrum("identity"))).recommend(**wrong)


# --- measuring a model


class Net(nn.Module):
    """BatchNorm, dropout, a frozen layer, a parameter of its own, and one beside the loss's way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.body(x)) * self.gain


def batches(n: int = 12, b: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(b, 6), torch.randint(0, 3, (b,))) for _ in range(n)]


def state(model: nn.Module) -> list[Tensor | bool | None]:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    tensors = [t.clone() for t in model.state_dict().values()]
    return [*tensors, *grads, *(m.training for m in model.modules()), torch.get_rng_state()]


def same(before: list[Tensor | bool | None], after: list[Tensor | bool | None]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("slices", [1, 3])
def test_k_is_that_of_the_stacked_gradients_and_adds_up_over_layers(slices):
    model, data = Net(), batches()
    found = probe(model, cross_entropy, data, k=4, slices=slices)
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with torch.random.fork_rng():  # the same dropout
        for x, y in data:
            rows.append(
                list(torch.autograd.grad(cross_entropy(model(x), y), params, allow_unused=True))
            )
    assert found.gram.allclose(gram_of(rows), rtol=1e-5, atol=1e-7)
    assert sum(found.layers.values()).allclose(found.gram)
    assert list(found.layers) == ["gain", "unused", "body.0", "body.1", "body.3"]
    assert found.layers["body.3"].allclose(
        gram_of([row[-2:] for row in rows]), rtol=1e-5, atol=1e-7
    )
    assert (found.b, found.k, len(found), found.absent) == (5, 4, 12, 0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_changed(training):
    model = Net().train(training)
    model.body[1].eval()
    model.gain.grad = torch.full((3,), 7.0)
    before = state(model)
    probe(model, cross_entropy, drawing(), k=4, slices=2)
    assert same(before, state(model))


def drawing() -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches as from a loader that draws from torch's generator while it is read."""
    for _ in range(12):
        yield torch.randn(5, 6), torch.randint(0, 3, (5,))


def test_nothing_is_left_changed_by_an_exception_in_the_middle():
    model = Net()
    data = batches()
    calls = []

    def failing(scores: Tensor, y: Tensor) -> Tensor:
        calls.append(model.eval())
        if len(calls) == 7:
            raise KeyboardInterrupt
        return cross_entropy(scores, y)

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        probe(model, failing, data, k=4)
    assert same(before, state(model))


def test_absent_micro_gradients_are_counted_and_left_out():
    data = batches(14)
    data[3] = (torch.full((5, 6), math.nan), data[3][1])
    model = nn.Linear(6, 3)
    found = probe(
        model, lambda scores, y: cross_entropy(scores, y) * (0 if y is data[5][1] else 1), data, k=4
    )
    kept = probe(model, cross_entropy, [one for i, one in enumerate(data) if i not in (3, 5)], k=4)
    assert found.absent == 2
    torch.testing.assert_close(found.gram, kept.gram)
    assert "12 of b = 5 samples, 2 absent" in str(found)


def test_mappings_go_to_the_model_by_name_and_their_loss_may_be_its_own():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": cross_entropy(self.linear(x), labels)}

    model, data = Own(), batches(8)
    found = probe(model, lambda out, _: out["loss"], [{"x": x, "labels": y} for x, y in data], k=4)
    assert torch.equal(found.gram, probe(model.linear, cross_entropy, data, k=4).gram)
    assert found.b == 5


def test_at_most_so_many_rows_are_taken_of_an_endless_loader():
    endless = ((torch.randn(5, 6), torch.randint(0, 3, (5,))) for _ in itertools.count())
    assert len(probe(nn.Linear(6, 3), cross_entropy, endless, k=4, rows=20)) == 20


def test_distances_are_of_pairs_and_print_tells_the_advice():
    found = probe(nn.Linear(6, 3), cross_entropy, batches(16), k=4)
    i, j = torch.triu_indices(16, 16, 1)
    norms = found.gram.diagonal().sqrt()
    assert found.distances().allclose(1 - found.gram[i, j] / norms[i] / norms[j])
    assert len(found.distances("bias")) == 120
    text = str(found)
    assert f"{found.recommend().tau:.3f}" in text
    assert "measured on other micro-gradients" in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, batches(7), k=4),
            ValueError,
            "micro_batches must give at least 8.*got 7",
        ),
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, batches(), k=1),
            ValueError,
            "k must be a whole number of at least 2; got 1",
        ),
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, batches(), slices=0),
            ValueError,
            "slices must be a whole number of at least 1",
        ),
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, batches(), rows=9),
            ValueError,
            "rows must be a whole number of at least 16; got 9",
        ),
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, [*batches(9), *batches(1, 4)], k=2),
            ValueError,
            "number 9 holds 4, the first 5",
        ),
        (
            lambda: probe(nn.Linear(6, 3), cross_entropy, torch.zeros(9, 6), k=2),
            TypeError,
            "must be a pair .* got Tensor",
        ),
        (
            lambda: probe(nn.Linear(6, 3), lambda s, y: s, batches(9), k=2),
            TypeError,
            r"loss_fn must return the mean loss.*\(5, 3\)",
        ),
        (
            lambda: probe(nn.Linear(6, 3).requires_grad_(False), cross_entropy, batches(9), k=2),
            ValueError,
            "that require a gradient",
        ),
        (
            lambda: probe(nn.Linear(6, 3), lambda s, y: s.sum() * 0, batches(9), k=2),
            ValueError,
            "9 of 9 micro-gradients are absent",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
