"""The levels of a codebook that serve given codes best, by what the layer's outputs lose."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.solvers.rounding import RoundingProblem


def best_levels(codes: Tensor, levels: Tensor, problem: RoundingProblem) -> Tensor:
    """argmin over a of Σ_rows (Q − V) M (Q − V)ᵀ with Q = Σ_k a_k D_k, D_k one where the code is k and zero elsewhere.

    codes: int64 [..., out, d], an index into levels for each weight. levels: [k], one of them 0, which stays; so do
    levels that no code names. Gives float64 [k], in the order of the codes. The least squares A a = b have
    A_kl = ⟨D_k M, D_l⟩ and b_k = ⟨D_k M, V⟩; a product of the weight's size with M is computed for each level.
    """
    count, flat = len(levels), codes.flatten()
    target = problem.target.flatten()
    normal = target.new_zeros(count, count, dtype=torch.float64)
    wanted = target.new_zeros(count, dtype=torch.float64)
    for k in range(count):
        product = ((codes == k).to(problem.metric) @ problem.metric).flatten()
        normal[k].index_add_(0, flat, product.double())
        wanted[k] = product.double() @ target.double()
    fitted = levels.double().clone()
    free = (levels != 0) & (normal.diagonal() > 0)
    if not bool(free.any()):
        return fitted
    matrix = normal[free][:, free]
    # Levels that always go together leave the matrix singular: a hair of damping keeps those where they are.
    damping = 1e-9 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    residual = wanted[free] - matrix @ fitted[free]
    fitted[free] += torch.linalg.solve(matrix + damping, residual)
    return fitted
