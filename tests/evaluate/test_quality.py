from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score

from gracile.errors import DataError
from gracile.evaluate.quality import aggregate, collect, compare, quality


def right(outputs, batch):
    return (outputs.argmax(dim=1) == batch[1]).float()


class MacroF1:
    name = "macro F1"

    def __call__(self, outputs, batch):
        return torch.stack((outputs.argmax(dim=1), batch[1]), dim=1)

    def aggregate(self, values):
        return f1_score(values[:, 1], values[:, 0], average="macro")


class Spearman:
    def __call__(self, outputs, batch):
        return torch.stack((outputs[:, 0], batch[1]), dim=1)

    def aggregate(self, values):
        return stats.spearmanr(values[:, 0], values[:, 1]).statistic


def batches(sizes=(5, 4, 3)):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=generator), torch.arange(n) % 3) for n in sizes]


def test_collect_gives_one_value_for_each_example_in_order():
    data = batches()
    values = collect(lambda batch: batch[0], data, right)
    logits, labels = torch.cat([x for x, _ in data]).numpy(), torch.cat([y for _, y in data]).numpy()
    assert values.dtype == np.float64
    assert values.tolist() == (logits.argmax(1) == labels).astype(float).tolist()
    assert aggregate(right, values) == np.mean(logits.argmax(1) == labels)


def test_an_aggregate_of_its_own_is_used_instead_of_the_mean():
    data = batches()
    metric = MacroF1()
    values = collect(lambda batch: batch[0], data, metric)
    assert values.shape == (12, 2)
    labels, predicted = values[:, 1], values[:, 0]
    scores = []
    for c in range(3):
        hit = np.sum((predicted == c) & (labels == c))
        scores.append(2 * hit / max(np.sum(predicted == c) + np.sum(labels == c), 1))
    assert quality(metric, values, resamples=20).value == pytest.approx(
        np.mean(scores), abs=1e-12
    )  # float64, three divisions
    assert quality(metric, values, resamples=20).name == "macro F1"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda o, b: torch.where(torch.arange(len(b[1])) == 2, torch.nan, 1.0), ["nan", "example 2", "batch 0"]),
        (lambda o, b: torch.full((len(b[1]),), torch.inf), ["inf", "batch 0"]),
        (lambda o, b: torch.ones(len(b[1]) - (len(b[1]) == 4)), ["3 values", "batch 1", "4 examples"]),
        (lambda o, b: torch.tensor(0.5), ["shape ()", "batch 0", "mean"]),
        (lambda o, b: "good", ["str", "batch 0"]),
        (lambda o, b: torch.ones(len(b[1]), 2 if len(b[1]) == 5 else 3), ["batch 1", "3 values", "2 values"]),
    ],
    ids=["nan", "inf", "length", "mean", "text", "width"],
)
def test_a_metric_that_gives_no_finite_value_per_example_is_refused(metric, words):
    with pytest.raises(DataError) as error:
        collect(lambda batch: batch[0], batches(), metric)
    for word in words:
        assert word in str(error.value)


def test_no_batches_is_an_error():
    with pytest.raises(DataError, match="no batches"):
        collect(lambda batch: batch[0], [], right)


def flipped(n, right_fraction, lost, won, seed=0):
    """0/1 values of a model, and of another that loses `lost` of the right ones and gains `won` of the wrong ones."""
    before = (np.arange(n) < right_fraction * n).astype(float)
    after = before.copy()
    after[:lost] = 0
    after[n - won :] = 1
    order = np.random.default_rng(seed).permutation(n)
    return before[order], after[order]


def test_the_paired_interval_is_that_of_scipy_bootstrap():
    before, after = flipped(2000, 0.9, 60, 20)
    result = compare(right, before, after, max_drop=0.05)
    theirs = stats.bootstrap(
        (before, after),
        lambda x, y, axis=-1: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert result.drop == pytest.approx(40 / 2000, abs=1e-12)
    # Both ends are Monte-Carlo quantiles of a spread of 0.0044; 2,000 draws put 0.0003 of error on them.
    assert result.low == pytest.approx(theirs.low, abs=0.0015)
    assert result.high == pytest.approx(theirs.high, abs=0.0015)
    assert result.low < result.drop < result.upper_bound < result.high


def test_pairing_matters_the_same_flips_give_a_tighter_bound_than_independent_models():
    before, after = flipped(1000, 0.8, 12, 8)
    paired = compare(right, before, after, max_drop=1).upper_bound
    shuffled = compare(right, before, np.random.default_rng(3).permutation(after), max_drop=1).upper_bound
    assert paired < 0.6 * shuffled


def test_no_flip_on_few_examples_does_not_prove_that_none_is_possible():
    before = np.ones(20)
    few = compare(right, before, before, max_drop=0.01)
    many = compare(right, np.ones(2000), np.ones(2000), max_drop=0.01)
    assert few.drop == 0.0
    assert not few.non_inferior
    assert many.non_inferior
    # Agresti & Min by hand: half an example in each cell, so variance (1 / 22) / 22.
    assert few.upper_bound == pytest.approx(stats.norm.ppf(0.95) * (1 / 22 / 22) ** 0.5, rel=1e-9)


def test_the_bound_holds_for_about_95_of_100_samples():
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        before = (generator.random(400) < 0.9).astype(float)
        flips = generator.random(400)
        after = np.where((before == 1) & (flips < 0.04), 0.0, np.where((before == 0) & (flips < 0.1), 1.0, before))
        held += compare(right, before, after, max_drop=1, seed=trial, resamples=300).upper_bound >= 0.9 * 0.04 - 0.01
    # 190 expected; the binomial's standard deviation is 3, so 180 is more than three of them below.
    assert held >= 180


@pytest.mark.parametrize(
    ("lost", "won", "limit", "words"),
    [
        (5, 2, 0.01, ["drop 0.15 pt", "at most", "95 %", "within the limit of 1 pt"]),
        (60, 2, 0.01, ["drop 2.9 pt", "over the limit of 1 pt"]),
        (22, 4, 0.01, ["not shown to be within", "more evaluation examples"]),
        (2, 100, 0.01, ["gain 4.9 pt", "at least", "within"]),
    ],
    ids=["within", "over", "open", "gain"],
)
def test_the_verdict_says_in_points_what_was_shown(lost, won, limit, words):
    before, after = flipped(2000, 0.9, lost, won)
    result = compare(right, before, after, max_drop=limit)
    assert result.non_inferior == ("within the limit" in result.verdict and "not shown" not in result.verdict)
    for word in words:
        assert word in result.verdict


def test_without_a_limit_the_verdict_speaks_of_none():
    before, after = flipped(2000, 0.9, 5, 2)
    verdict = compare(right, before, after, max_drop=float("inf")).verdict
    assert verdict.startswith("drop 0.15 pt, at most")
    assert verdict.endswith("95 % confidence")


def test_a_metric_not_between_0_and_1_is_not_spoken_of_in_points():
    values = -np.linspace(2, 5, 100)
    assert " pt" not in compare(lambda o, b: None, values, values - 0.1, max_drop=0.2).verdict


def test_a_metric_undefined_on_most_resamples_cannot_prove_anything():
    class OnlyWhenRareIsSeen:
        def aggregate(self, values):
            return float(values.mean()) if values.max() == 1 else float("nan")

    values = np.zeros(50)
    values[7] = 1.0  # seen in 1 - (1 - 1/50)^50 = 64 % of resamples
    result = compare(OnlyWhenRareIsSeen(), values, values, max_drop=0.5)
    assert result.upper_bound == float("inf")
    assert not result.non_inferior
    assert "unknown" in result.verdict


def test_one_example_gives_no_bound():
    assert compare(right, np.ones(1) * 0.3, np.ones(1) * 0.3, max_drop=1).upper_bound == float("inf")


def test_different_examples_are_refused():
    with pytest.raises(DataError, match="different examples"):
        compare(right, np.ones(5), np.ones(6), max_drop=0.1)


def test_the_interval_of_a_rate_is_wilsons():
    values = np.array([1.0] * 90 + [0.0] * 10)
    z, p, n = stats.norm.ppf(0.975), 0.9, 100
    centre, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * (p * 0.1 / n + z**2 / 4 / n**2) ** 0.5
    result = quality(right, values)
    assert (result.low, result.high) == pytest.approx((centre - half, centre + half), rel=1e-9)
    assert quality(right, np.ones(10)).low < 0.8


def test_the_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    result = quality(lambda o, b: None, values)
    half = 1.96 * values.std() / 1000**0.5
    # 2,000 draws place the ends within about 0.03 of a half width.
    assert result.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert result.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_same_seed_gives_the_same_numbers():
    before, after = flipped(300, 0.9, 9, 3)
    metric = MacroF1()
    rows = [np.stack((v, np.ones_like(v)), axis=1) for v in (before, after)]
    assert compare(metric, *rows, max_drop=0.1, resamples=50) == compare(metric, *rows, max_drop=0.1, resamples=50)


def test_speed_of_5000_examples():
    generator = np.random.default_rng(0)
    before, after = flipped(5000, 0.9, 100, 50)
    start = time.process_time()
    compare(right, before, after, max_drop=0.01)
    mean = time.process_time() - start
    scores = generator.normal(size=(5000, 2))
    start = time.process_time()
    compare(Spearman(), scores, scores + generator.normal(size=(5000, 2)) * 0.1, max_drop=0.1)
    ranked = time.process_time() - start
    assert mean < 2, mean
    assert ranked < 20, ranked
