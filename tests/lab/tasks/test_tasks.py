"""The tasks beyond pictures: what they read, what their noise changes, and that they train."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gaf_lab.settings.config import TrainConfig
from gaf_lab.tasks import control, games, genres, language, speech
from gaf_lab.training.loop import Training
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

CONFIG = TrainConfig(noise="none", noise_rate=0.0, seed=3)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


# --- speech ---


def utterance(frames, speaker, shift=0.0):
    rows = [[shift + c + t / 10 for t in range(frames)] for c in range(12)]
    return ":".join([*(",".join(map(str, row)) for row in rows), str(speaker)])


def test_utterances_have_their_frames_then_zeros_and_a_channel_that_says_where():
    text = f"#a comment\n@data\n{utterance(7, 1)}\n{utterance(29, 9)}\n"
    x, speaker = speech.parse_utterances(text)
    assert x.shape == (2, 13, 29)
    assert speaker.tolist() == [0, 8]
    assert x[0, 12].tolist() == [1.0] * 7 + [0.0] * 22
    assert not x[0, :, 7:].any()
    assert x[1, 3, 28].item() == pytest.approx(3 + 2.8)


def test_coefficients_are_scaled_by_the_frames_of_the_training_set(monkeypatch):
    train = "\n".join([utterance(7, 1), utterance(9, 2, shift=5.0)])
    files = {"JapaneseVowels_TRAIN.ts": train, "JapaneseVowels_TEST.ts": train}
    monkeypatch.setattr(
        speech, "read_package", lambda *given: {k: v.encode() for k, v in files.items()}
    )
    problem = speech.speakers(CONFIG)
    x, _ = problem.train
    frames = x.movedim(1, 2)[x[:, -1] > 0]
    assert frames[:, :12].mean(0).abs().max() < 1e-6
    assert torch.allclose(frames[:, :12].std(0), torch.ones(12))
    assert torch.equal(x, problem.test[0])
    assert problem.new_model()(x).shape == (2, 9)


# --- language ---


def test_sequences_overlap_by_a_byte_and_end_in_the_test_set():
    text = bytes(i % 100 for i in range(32 * 20 + 1))
    train, test = language.cut(text)
    assert (len(train), len(test)) == (18, 2)
    assert bytes(torch.cat([train, test])[:, :-1].flatten().tolist()) == text[:-1]
    assert train[1, 0] == train[0, -1]


def test_a_share_of_the_sequences_is_shuffled_and_no_byte_is_lost():
    sequences = torch.arange(40 * 33).reshape(40, 33).remainder(128).to(torch.uint8)
    found = language.shuffle_some(sequences, 0.25, seed=1)
    differ = (found != sequences).any(1)
    assert differ.sum() == 10
    assert torch.equal(found.sort(1).values, sequences.sort(1).values)
    assert torch.equal(found, language.shuffle_some(sequences, 0.25, seed=1))
    assert not torch.equal(found, language.shuffle_some(sequences, 0.25, seed=2))


def test_the_loss_is_the_mean_cross_entropy_of_a_sequence_and_the_metric_in_bits():
    scores, target = torch.randn(3, 32, 128).double(), torch.randint(128, (3, 32))
    expected = torch.stack([cross_entropy(s, t) for s, t in zip(scores, target, strict=True)])
    assert torch.allclose(language.nats_per_byte(scores, target), expected, rtol=1e-12)
    uniform = torch.zeros(1, 32, 128)
    bits = language.bits_per_byte(uniform, torch.zeros(1, 32, dtype=torch.int64))
    assert bits.item() == pytest.approx(7.0)


def test_the_transformer_does_not_see_what_comes_later():
    model = language.ByteTransformer().eval()
    x = torch.randint(128, (2, 32), dtype=torch.uint8)
    y = x.clone()
    y[:, 20] = (y[:, 20] + 1) % 128
    before, after = model(x), model(y)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


# --- genres ---


def test_passages_are_whole_and_their_words_without_tags():
    text = " ".join(f"Word{i}/nn-tl" for i in range(250)) + " and/or/cc"
    passages = genres.cut_words(text)
    assert [len(words) for words in passages] == [100, 100]
    assert passages[1][0] == "word100"
    assert genres.cut_words(" ".join(["and/or/cc"] * 100))[0][0] == "and/or"


def test_texts_of_the_test_give_no_words_to_the_vocabulary(monkeypatch):
    texts = {
        "ca01": "a/at " * 100,
        "ca05": "b/at " * 100,
        "cb01": "c/at " * 200,
        "cb05": "a/at " * 100,
    }
    monkeypatch.setattr(
        genres, "read_package", lambda *given: {k: v.encode() for k, v in texts.items()}
    )
    genres.read_passages.cache_clear()
    problem = genres.genres(CONFIG)
    genres.read_passages.cache_clear()
    (x, y), (test_x, test_y) = problem.train, problem.test
    assert problem.classes == 2
    assert y.tolist() == [0, 1, 1]
    assert test_y.tolist() == [0, 1]
    assert x[:, 0].tolist() == [2, 1, 1]  # by frequency
    assert test_x[:, 0].tolist() == [genres.RARE, 2]
    assert problem.new_model()(x).shape == (3, 2)


# --- control ---


def test_advantages_are_scaled_sums_of_discounted_rewards():
    alive = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    d = control.DISCOUNT
    returns = torch.tensor([1 + d + d * d, 1 + d, 1.0, 1.0])
    expected = (returns - returns.mean()) / returns.std(correction=0)
    found = control.advantages(alive, alive)
    assert torch.allclose(found[alive > 0], expected, atol=1e-6)
    assert not found[alive == 0].any()
    # rewards of the other sign, in the whole micro-batch
    assert torch.allclose(control.advantages(-alive, alive), -found, atol=1e-6)


def test_an_episode_is_the_same_in_any_batch_and_its_return_counts_its_steps():
    pytest.importorskip("gymnasium")
    torch.manual_seed(0)
    model = control.PolicyGradient(control.CARTPOLE)
    x = control.episodes(0, 6)
    output = model(x)
    assert torch.equal(output[2:4, 1], model(x[2:4])[:, 1])
    assert (output[:, 1] >= 8).all()  # no pole falls sooner
    assert (output[:, 1] <= control.CARTPOLE.steps).all()
    *_, alive = model.play(x[:, 0])
    assert torch.equal(alive.sum(1), output[:, 1])
    assert (alive.diff(dim=1) <= 0).all()


def test_an_action_is_drawn_by_the_chances():
    chances, luck = torch.tensor([0.2, 0.5, 0.3]), (torch.arange(1000) + 0.5) / 1000
    action = control.draw_actions(chances.expand(1000, 3), luck)
    assert action.bincount().tolist() == [200, 500, 300]


def test_acrobots_move_as_gymnasiums_own_and_see_the_same():
    gymnasium = pytest.importorskip("gymnasium")
    states = np.random.default_rng(0).uniform(-0.1, 0.1, (3, 4))
    actions = np.random.default_rng(1).integers(0, 3, (40, 3))
    several = games.Acrobots(3)
    seen = [several.begin(states), *(several.step(action)[0] for action in actions)]
    assert not several.over.any()
    for i, state in enumerate(states):
        one = gymnasium.make("Acrobot-v1").unwrapped
        one.reset()
        one.state = state
        assert np.allclose(one._get_ob(), seen[0][i], atol=1e-7)
        for action, here in zip(actions[:, i], seen[1:], strict=True):
            for _ in range(games.HELD):
                there, *_ = one.step(action)
            assert np.array_equal(there, here[i])


def test_an_acrobots_return_counts_its_steps_until_it_is_high_enough():
    pytest.importorskip("gymnasium")
    high, low = np.array([3.0, 0.0, 0.5, 0.0]), np.zeros(4)
    several = games.Acrobots(2)
    several.begin(np.stack([high, low]))
    _, rewards, over = several.step(np.array([1, 1]))
    assert over.tolist() == [True, False]
    assert rewards.tolist() == [0.0, -games.HELD]  # high after its first step
    torch.manual_seed(0)
    output = control.PolicyGradient(games.ACROBOT)(control.episodes(0, 3))
    assert output[:, 1].min() >= -500
    never = control.PolicyGradient(games.ACROBOT).requires_grad_(False)
    for weight in never.parameters():
        weight.zero_()
    never.network[2].bias[1] = 100.0  # no push
    assert never(control.episodes(0, 2))[:, 1].tolist() == [-500.0, -500.0]


def test_wrong_signs_of_all_rewards_turn_the_gradient_round():
    pytest.importorskip("gymnasium")
    torch.manual_seed(0)
    model = control.PolicyGradient(control.CARTPOLE)
    x = control.episodes(0, 4)
    grads = []
    for sign in (1, -1):
        signed = torch.stack([x[:, 0], sign * x[:, 1]], 1)
        loss = control.surrogate_of(model(signed), torch.zeros(4)).mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, -other, atol=1e-6)


def test_a_share_of_the_episodes_has_the_wrong_sign():
    noisy = changed(task="gaf_lab.tasks.control:cartpole", noise="task", noise_rate=0.3)
    sign = control.episodes(0, 4000, noisy)[:, 1]
    assert (sign < 0).double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)
    assert (control.episodes(0, 50, CONFIG)[:, 1] == 1).all()


# --- runs ---


def of_task(name, **changes):
    usual = {"k": 8, "b": 2, "eval_every": 0.25, "passes": 1.0, "policy": "mean", "device": "cpu"}
    return changed(**{**usual, "task": f"gaf_lab.tasks.{name}", **changes})


@pytest.fixture
def texts(monkeypatch):
    """Some text in place of the plays: 160 sequences, 144 of them to train on."""
    text = (b"the quick brown fox jumps over the lazy dog, and 1 more. " * 90)[: 160 * 32 + 1]
    monkeypatch.setattr(language, "TESTED", 16)
    monkeypatch.setattr(language, "read_package", lambda *given: {"a.txt": text})
    language.read_sequences.cache_clear()
    yield
    language.read_sequences.cache_clear()


def run_and_resume(config, folder):
    run = train(config, folder / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, folder / "parts", Stop(after=5))
    train(config, folder / "parts", Silent(), resume=True)
    assert_same(final_state(folder / "parts"), final_state(folder / "whole"))
    return run


def untrained(game):
    """The mean return of the first weights."""
    problem = getattr(control, game)(CONFIG)
    torch.manual_seed(CONFIG.seed)
    return problem.new_model().eval()(problem.test[0])[:, 1].mean().item()


@pytest.mark.parametrize("game", ["cartpole", "acrobot"])
def test_control_trains_and_resumes_to_the_bit(game, tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(control, "TESTED", 10)
    options = {"limit": 128, "heldout": 0.0, "optimizer": "adam", "lr": 0.02}
    run = run_and_resume(of_task(f"control:{game}", **options), tmp_path)
    assert run.score.name == "return"
    assert run.evals[-1]["test_metric"] > untrained(game)


def test_the_plays_train_and_resume_to_the_bit(texts, tmp_path):
    options = {"noise": "task", "noise_rate": 0.25, "optimizer": "adamw", "lr": 0.005}
    run = run_and_resume(of_task("language:plays", **options), tmp_path)
    assert (run.score.name, run.score.higher) == ("bits per byte", False)
    assert run.evals[-1]["test_metric"] < run.evals[0]["test_metric"] < 7


def test_one_worker_of_eight_has_all_the_noise(texts):
    options = {
        "noise": "task",
        "noise_rate": 0.125,
        "sampler": "sharded",
        "heldout": 0.0,
    }
    data = Training(of_task("language:plays", **options), None).problem
    wrong = (data.train.observed != data.train.clean).any(1)
    for step in range(3):
        shares = [wrong[data.index(step, i)].double().mean().item() for i in range(8)]
        assert shares == [1.0] + [0.0] * 7
