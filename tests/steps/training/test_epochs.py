from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.steps.training.epochs import Epochs


def finished(epochs: list[Tensor], directory: Path | None = None) -> tuple[Epochs, nn.Linear]:
    """A model whose weight is the number of the epoch, and these held-out losses."""
    model = nn.Linear(1, 1, bias=False)
    found = Epochs(model, torch.optim.SGD(model.parameters(), 0.1), directory)
    for i, losses in enumerate(epochs):
        nn.init.constant_(model.weight, i)
        found.finish_epoch(losses.double())
    return found, model


def kept(epochs: list[Tensor]) -> int:
    found, model = finished(epochs)
    best = found.restore_best()
    assert model.weight.item() == best
    return best


def spread(mean: float, deviations: list[float]) -> Tensor:
    values = torch.tensor(deviations, dtype=torch.float64)
    return mean + values - values.mean()


SAME = [0.3, -0.2, 0.1, 0.5, -0.4, 0.0, 0.2, -0.5, 0.1]
OTHER = [0.1, -0.1, 0.3, 0.1, -0.2, 0.0, -0.2, 0.2, -0.2]


@pytest.mark.parametrize(("more", "best"), [(0.9, 2), (1.1, 1)])
def test_the_last_epoch_is_kept_within_one_standard_error_of_the_lowest(more: float, best: int) -> None:
    noise = np.std(np.array(OTHER), ddof=1) / 3  # of nine differences
    start, lowest = spread(5.0, SAME), spread(1.0, SAME)
    last = lowest + spread(more * noise, OTHER)
    assert kept([start, lowest, last]) == best


def test_what_all_batches_agree_on_is_no_noise() -> None:
    assert kept([spread(5.0, SAME), spread(1.0, SAME), spread(1.001, SAME)]) == 1


def test_the_last_epoch_must_be_better_than_the_start() -> None:
    start = spread(1.0, SAME)
    assert kept([start, start + spread(0.01, OTHER)]) == 0
    assert kept([start, start + spread(-0.01, OTHER)]) == 1


def test_few_batches_tell_no_noise() -> None:
    few = [spread(5.0, SAME)[:7], spread(1.0, SAME)[:7], (spread(1.0, SAME) + spread(0.01, OTHER))[:7]]
    assert kept(few) == 1


def test_an_epoch_that_is_not_finite_is_not_kept() -> None:
    broken = spread(1.0, SAME)
    broken[3] = float("nan")
    assert kept([spread(5.0, SAME), spread(1.0, SAME), broken]) == 1
    assert kept([spread(5.0, SAME), broken, spread(2.0, SAME)]) == 2


@pytest.mark.parametrize("more", [0.001, 1.0])
def test_a_resumed_run_keeps_the_same_epoch(more: float, tmp_path: Path) -> None:
    epochs = [spread(5.0, SAME), spread(1.0, SAME), spread(1.0 + more, OTHER)]
    finished(epochs, tmp_path)
    model = nn.Linear(1, 1, bias=False)
    resumed = Epochs(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path)
    resumed.resume()
    assert resumed.history == pytest.approx([float(losses.mean()) for losses in epochs])
    assert model.weight.item() == 2
    assert resumed.restore_best() == kept(epochs) == (2 if more < 0.1 else 1)
    assert model.weight.item() == kept(epochs)
