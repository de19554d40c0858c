from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import brier_score_loss, log_loss

from gracile.errors import DataError
from gracile.evaluate.behaviour import ClassBehaviour, OutputBehaviour, behaviour


def first(batch):
    return batch[0]


def second(batch):
    return batch[1]


def pairs(n=200, classes=4, seed=0, batch=33):
    """Batches (logits before, logits after, labels)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    before = 2 * torch.randn(n, classes, generator=g) + 2 * torch.nn.functional.one_hot(labels, classes)
    after = before + torch.randn(n, classes, generator=g)
    return list(zip(before.split(batch), after.split(batch), labels.split(batch)))


def arrays(data):
    return tuple(torch.cat(parts).double().numpy() for parts in zip(*data))


def test_flips_divergence_and_classes_are_those_of_numpy():
    data = pairs()
    result = behaviour(first, second, data)
    assert isinstance(result, ClassBehaviour)
    before, after, labels = arrays(data)
    was, now = before.argmax(1), after.argmax(1)
    assert result.examples == 200
    assert result.right_to_wrong == sum(w == y != n for w, n, y in zip(was, now, labels))
    assert result.wrong_to_right == sum(w != y == n for w, n, y in zip(was, now, labels))
    assert result.changed == sum(was != now)
    assert result.changed > result.right_to_wrong + result.wrong_to_right  # some went from wrong to wrong
    p, q = softmax(before, axis=1), softmax(after, axis=1)
    assert result.kl == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-9)  # float64 throughout
    for change in result.classes:
        held = labels == change.label
        assert change.examples == held.sum()
        assert change.before == pytest.approx((was[held] == change.label).mean(), abs=1e-12)
        assert change.after == pytest.approx((now[held] == change.label).mean(), abs=1e-12)


def test_examples_that_changed_most_are_found_across_batches():
    data = pairs()
    before, after, labels = arrays(data)
    p, q = softmax(before, axis=1), softmax(after, axis=1)
    shift = np.abs(p - q).sum(1) / 2
    found = behaviour(first, second, data, examples=7).most_changed
    assert [e.index for e in found] == np.argsort(-shift)[:7].tolist()
    worst = found[0]
    assert worst.shift == pytest.approx(shift.max(), rel=1e-9)
    assert (worst.label, worst.before, worst.after) == (
        labels[worst.index],
        p[worst.index].argmax(),
        q[worst.index].argmax(),
    )
    assert worst.before_probability == pytest.approx(p[worst.index].max(), rel=1e-9)
    assert worst.after_probability == pytest.approx(q[worst.index].max(), rel=1e-9)


def test_calibration_is_that_of_scikit_learn_and_of_a_loop_over_bins():
    data = pairs(seed=1)
    before, _, labels = arrays(data)
    p = softmax(before, axis=1)
    calibration = behaviour(first, second, data).before
    assert calibration.nll == pytest.approx(log_loss(labels, p), rel=1e-9)
    assert calibration.brier == pytest.approx(brier_score_loss(labels, p, scale_by_half=False), rel=1e-9)
    confidence, right = p.max(1), p.argmax(1) == labels
    ece = 0.0
    for b in range(15):
        held = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if held.any():
            ece += held.mean() * abs(confidence[held].mean() - right[held].mean())
            assert calibration.bins[b] == pytest.approx((held.sum(), confidence[held].mean(), right[held].mean()))
    assert calibration.ece == pytest.approx(ece, rel=1e-9)
    assert sum(count for count, _, _ in calibration.bins) == 200


def test_full_confidence_falls_into_the_last_bin():
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    result = behaviour(first, second, [(logits, logits, torch.tensor([0, 1]))])
    assert result.before.bins[-1] == (2, 1.0, 0.5)
    assert result.before.ece == pytest.approx(0.5)


def test_the_same_model_twice_changes_nothing():
    data = [(x, x, y) for x, _, y in pairs()]
    result = behaviour(first, second, data)
    assert (result.right_to_wrong, result.wrong_to_right, result.changed, result.kl) == (0, 0, 0, 0.0)
    assert result.most_changed == ()
    assert result.classes == ()


def test_probabilities_are_not_taken_for_logits():
    data = pairs()
    soft = [(x.softmax(1), y.softmax(1), z) for x, y, z in data]
    a, b = behaviour(first, second, data), behaviour(first, second, soft)
    assert b.kl == pytest.approx(a.kl, rel=1e-4)  # the softmax was rounded to float32
    assert b.before.nll == pytest.approx(a.before.nll, rel=1e-4)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_one_logit_is_two_classes(shape, dtype):
    g = torch.Generator().manual_seed(2)
    x, y = 3 * torch.randn(50, generator=g), 3 * torch.randn(50, generator=g)
    labels = (torch.arange(50) % 2).to(dtype)
    one = behaviour(first, second, [(x.reshape(shape), y.reshape(shape), labels)])
    zeros = torch.zeros(50)
    two = behaviour(first, second, [(torch.stack((zeros, x), 1), torch.stack((zeros, y), 1), labels.long())])
    assert one == two
    assert one.changed == ((x > 0) != (y > 0)).sum()


def test_tokens_count_one_by_one_without_the_ignored():
    g = torch.Generator().manual_seed(3)
    before, after = torch.randn(6, 5, 3, generator=g), torch.randn(6, 5, 3, generator=g)
    labels = torch.randint(3, (6, 5), generator=g)
    labels[:, 3:] = -100
    last = behaviour(first, second, [(before, after, labels)])
    channels = behaviour(first, second, [(before.movedim(2, 1), after.movedim(2, 1), labels)])
    assert last == channels
    assert last.examples == 18
    was, now = before[:, :3].argmax(2), after[:, :3].argmax(2)
    assert last.right_to_wrong == ((was == labels[:, :3]) & (now != labels[:, :3])).sum()
    assert all(e.index < 6 for e in last.most_changed)


def test_outputs_that_are_not_classes_are_compared_as_vectors():
    g = torch.Generator().manual_seed(4)
    before = torch.randn(40, 8, generator=g)
    after = before + 0.1 * torch.randn(40, 8, generator=g)
    scores = torch.rand(40, generator=g)
    result = behaviour(first, second, list(zip(before.split(9), after.split(9), scores.split(9))))
    assert isinstance(result, OutputBehaviour)
    a, b = before.double().numpy(), after.double().numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result.cosine == pytest.approx(cosine.mean(), rel=1e-9)
    assert result.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-9)
    assert result.largest_error == pytest.approx(np.abs(a - b).max(), rel=1e-12)
    shift = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    assert [e.index for e in result.most_changed] == np.argsort(-shift)[:10].tolist()


def test_counts_that_start_with_zeros_and_ones_are_no_classes():
    data = [
        (torch.tensor([0.5, 2.0]), torch.tensor([0.6, 2.0]), torch.tensor([0, 1])),
        (torch.tensor([5.0, 7.0]), torch.tensor([5.0, 8.0]), torch.tensor([5, 7])),
    ]
    result = behaviour(first, second, data)
    assert isinstance(result, OutputBehaviour)
    assert result.examples == 4
    assert result.cosine is None
    assert result.largest_error == 1.0


def test_without_labels_outputs_are_vectors():
    result = behaviour(lambda x: x, lambda x: 2 * x, [torch.ones(3, 4)])
    assert isinstance(result, OutputBehaviour)
    assert result.relative_error == 1.0


def test_models_with_different_classes_are_refused():
    with pytest.raises(DataError, match=r"\(5, 3\) and \(5, 4\)"):
        behaviour(first, second, [(torch.ones(5, 3), torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))])


def test_no_batches_is_an_error():
    with pytest.raises(DataError, match="no batches"):
        behaviour(first, second, [])
