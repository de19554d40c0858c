"""Levels for given codes: against a least-squares problem written out, and what stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.solvers.codebook import best_levels
from tests.solvers.rounding_problems import layer


def written_out(codes: Tensor, count: int, zero: int, target: Tensor, metric: Tensor) -> Tensor:
    """The levels but the zero, by lstsq on every output: rows of L ⊗ one-hot, M = Lᵀ L."""
    root = torch.linalg.cholesky(metric).mT
    rows, wanted = [], []
    for codes_of_row, target_of_row in zip(codes, target):
        hot = torch.nn.functional.one_hot(codes_of_row, count).double()
        rows.append(root @ hot)
        wanted.append(root @ target_of_row)
    free = [k for k in range(count) if k != zero]
    return torch.linalg.lstsq(torch.cat(rows)[:, free], torch.cat(wanted).unsqueeze(1)).solution.squeeze(1)


def test_levels_are_those_of_least_squares() -> None:
    weight, problem = layer(0, 7, 12)
    levels = torch.tensor([-1.0, 0.0, 0.6, 1.5])
    codes = (weight.unsqueeze(-1) - levels).abs().argmin(-1)
    found = best_levels(codes, levels, problem)
    assert found[1] == 0
    expected = written_out(codes, 4, 1, problem.target, problem.metric)
    assert torch.allclose(found[[0, 2, 3]], expected, atol=1e-6)  # the damping is 1e-9
    before, after = (problem.loss(a[codes].double()).sum() for a in (levels, found))
    assert after < before


def test_groups_of_a_convolution_share_the_levels() -> None:
    weight, problem = layer(1, 4, 9, groups=3)
    levels = torch.tensor([-0.8, 0.0, 0.8])
    codes = (weight.unsqueeze(-1) - levels).abs().argmin(-1)
    found = best_levels(codes, levels, problem)
    for shift in torch.eye(3)[[0, 2]] * 1e-3:  # no other levels are better
        for sign in (-1, 1):
            moved = found + sign * shift
            assert problem.loss(moved[codes]).sum() > problem.loss(found[codes]).sum()


def test_levels_that_no_code_names_stay() -> None:
    _, problem = layer(2, 3, 5)
    levels = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    found = best_levels(torch.full((3, 5), 2), levels, problem)
    assert found[[0, 1, 3]].tolist() == [-9.0, 0.0, 9.0] and found[2] != 1.0
    assert best_levels(torch.full((3, 5), 1), levels, problem).tolist() == levels.tolist()
