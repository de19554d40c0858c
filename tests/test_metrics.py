from __future__ import annotations

import builtins
import time

import numpy as np
import pytest
import torch
from scipy import stats

from gracile import metrics
from gracile.errors import ConfigError, DataError, MissingExtraError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(n: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, count, (n,), generator=torch.Generator().manual_seed(seed))


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert metrics.accuracy(logits, (None, torch.tensor([1, 1, 1]))).tolist() == [1, 0, 1]
    assert metrics.accuracy({"logits": logits}, {"labels": torch.tensor([[1], [0], [0]])}).tolist() == [1, 1, 0]
    # one logit, by its sign
    single = torch.tensor([[0.3], [-0.2], [1.0]])
    assert metrics.accuracy(single, (None, torch.tensor([1, 1, 1]))).tolist() == [1, 0, 1]
    assert metrics.accuracy(single[:, 0], (None, torch.tensor([1.0, 0.0, 0.0]))).tolist() == [1, 1, 0]
    assert not hasattr(metrics.accuracy, "aggregate")  # a plain mean of zeros and ones


def test_accuracy_of_sequences_counts_labelled_positions() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1, 2], [0, 0, 0]])]
    labels = torch.tensor([[0, 1, 0], [0, -100, -100]])
    np.testing.assert_allclose(metrics.accuracy(logits, (None, labels)), [2 / 3, 1])
    values = metrics.token_accuracy(logits, (None, labels))
    assert values.tolist() == [[2, 3], [1, 1]]
    assert metrics.token_accuracy.aggregate(values) == 0.75


@pytest.mark.parametrize("average", ["binary", "macro", "micro", "weighted"])
@pytest.mark.parametrize("seed", range(4))
def test_f1_equals_scikit_learn(average: str, seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    count = 2 if average == "binary" else 6
    logits, labels = normal(40, count, seed=seed), classes(40, count, seed)
    labels[labels == 3] = 2  # a class that is only ever predicted
    metric = metrics.F1(average)
    values = metric(logits, (None, labels))
    expected = sklearn.f1_score(labels.numpy(), logits.argmax(1).numpy(), average=average)
    assert metric.aggregate(values) == pytest.approx(expected, abs=1e-12)


def test_f1_without_a_positive_is_zero() -> None:
    values = metrics.F1("binary")(torch.tensor([[1.0, 0.0]]), (None, torch.tensor([0])))
    assert metrics.F1("binary").aggregate(values) == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_correlations_equal_scipys(tied: bool) -> None:
    scores, targets = normal(200, 1), normal(200, seed=1) + normal(200)
    if tied:
        scores, targets = scores.round(), targets.round()
    for metric, reference in ((metrics.pearson, stats.pearsonr), (metrics.spearman, stats.spearmanr)):
        values = metric(scores, (None, targets))
        expected = reference(scores[:, 0].double().numpy(), targets.double().numpy()).statistic
        assert metric.aggregate(values) == pytest.approx(expected, abs=1e-12)
        constant = values.copy()
        constant[:, 0] = 0.1
        assert np.isnan(metric.aggregate(constant))


@pytest.mark.parametrize("outputs", [1, 3])
def test_r2_equals_scikit_learn(outputs: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, targets = normal(50, outputs), normal(50, outputs, seed=1)
    values = metrics.r2(predicted, (None, targets))
    expected = sklearn.r2_score(targets.double().numpy(), predicted.double().numpy())
    assert metrics.r2.aggregate(values) == pytest.approx(expected, abs=1e-12)
    assert metrics.r2.aggregate(metrics.r2(targets, (None, targets))) == 1.0
    assert np.isnan(metrics.r2.aggregate(metrics.r2(predicted, (None, torch.ones(50, outputs)))))


@pytest.mark.parametrize("tied", [False, True])
def test_ranking_metrics_equal_scikit_learn(tied: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = normal(100, 2), classes(100, 2)
    if tied:
        logits = logits.round()
    probabilities = (logits[:, 1] - logits[:, 0]).double().numpy()
    for metric, reference in (
        (metrics.auc, sklearn.roc_auc_score),
        (metrics.average_precision, sklearn.average_precision_score),
    ):
        values = metric(logits, (None, labels))
        assert metric.aggregate(values) == pytest.approx(reference(labels.numpy(), probabilities), abs=1e-12)
        single = metric((logits[:, 1] - logits[:, 0])[:, None], (None, labels))
        np.testing.assert_array_equal(single, values)
        assert np.isnan(metric.aggregate(values * [1, 0]))


def test_perplexity_equals_numpy_and_is_shown_positive() -> None:
    logits, tokens = normal(3, 6, 11), classes(18, 11).reshape(3, 6)
    tokens[0, 3:] = -100
    losses = []
    for b in range(3):
        for t in range(5):
            if tokens[b, t + 1] != -100:
                row = logits[b, t].double().numpy()
                losses.append(np.log(np.exp(row).sum()) - row[tokens[b, t + 1]])
    values = metrics.perplexity(logits, {"labels": tokens})
    assert values[:, 1].tolist() == [2, 5, 5]
    value = metrics.perplexity.aggregate(values)
    assert value == pytest.approx(-np.exp(np.mean(losses)), rel=1e-6)  # losses are float32
    assert metrics.perplexity.display(value) == -value
    aligned = metrics.Perplexity(shift=0)(logits[:, :-1], {"labels": tokens[:, 1:]})
    np.testing.assert_array_equal(aligned, values)


def test_squared_error_and_cross_entropy_are_negative_means_of_examples() -> None:
    outputs, targets = normal(4, 3), normal(4, 3, seed=1)
    expected = -((outputs - targets).double().numpy() ** 2).mean(axis=1)
    np.testing.assert_allclose(metrics.mean_squared_error(outputs, (None, targets)), expected, rtol=1e-6)
    labels = classes(4, 3)
    expected = outputs.double().log_softmax(1).numpy()[np.arange(4), labels.numpy()]
    np.testing.assert_allclose(metrics.negative_cross_entropy(outputs, (None, labels)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("metric", "outputs", "labels"),
    [
        (metrics.accuracy, normal(4, 3), torch.zeros(5, dtype=torch.long)),
        (metrics.f1, normal(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)),
        (metrics.spearman, normal(4, 2), torch.zeros(4, 2)),
        (metrics.spearman, normal(4, 2), torch.zeros(4)),
        (metrics.auc, normal(4, 3), torch.zeros(4)),
        (metrics.auc, normal(4, 2), torch.tensor([0, 1, 2, 0])),
        (metrics.perplexity, normal(4, 2), torch.zeros(4, dtype=torch.long)),
        (metrics.negative_cross_entropy, normal(4, 3), torch.rand(4, 3)),
    ],
)
def test_what_does_not_fit_is_refused(metric, outputs: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError):
        metric(outputs, (None, labels))


def test_impossible_settings_are_refused() -> None:
    for bad in (lambda: metrics.F1("mean"), lambda: metrics.Perplexity(shift=-1)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            bad()


def test_the_absence_of_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"gracile\[metrics\]"):
        metrics.average_precision.aggregate(np.array([[0.1, 1.0], [0.2, 0.0]]))


@pytest.mark.parametrize(
    "metric", [metrics.f1, metrics.pearson, metrics.spearman, metrics.r2, metrics.auc, metrics.perplexity], ids=str
)
def test_aggregates_are_fast_enough_to_resample(metric) -> None:
    generator = np.random.default_rng(0)
    values = np.stack([generator.integers(0, 5, 5000), generator.integers(0, 2, 5000)], axis=1).astype(float)
    fastest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        metric.aggregate(values)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 5e-3  # 2,000 resamples in 10 s; measured 0.02 to 0.9 ms, the limit leaves room for a busy machine
