"""The last factors before the outputs, fitted to the original's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data, logits_of
from gracile.modes import eval_mode
from gracile.stats.match import divergence, split_batches
from gracile.stats.replay import Replay

#: Numbers in the outputs that are fitted to, all batches together.
OUTPUTS = 1 << 25
STEPS = 20
#: Of the outputs' change with the factors: how far they may be from affine, which float32 rounds.
TOLERANCE = 1e-3


def fit_last_factors(model: nn.Module, original: nn.Module, name: str, data: Data) -> tuple[float, float] | None:
    """argmin_θ E KL(softmax y₀ ‖ softmax y(θ)) over the factors and bias θ of the normalisation `name`, in place.

    y₀, y: [n, classes], of the original and of the model, which is affine in θ, so that the problem is convex: vector
    scaling (Guo et al. 2017, arXiv:1706.04599) of what the last layer reads, towards another model in place of labels.
    By L-BFGS from the present θ, on as many calibration batches as OUTPUTS allows. Returns the divergence on held-out
    batches before and after; where it did not fall, θ is as before. None, and nothing done, where the outputs are no
    scores of classes or not affine in θ.
    """
    fitted, held_out = split_batches(data)
    with eval_mode(model, original), torch.no_grad():
        expected = _outputs(original, data, held_out)
        if expected[0].ndim != 2 or expected[0].shape[1] < 2:
            return None
        some = fitted[: max(1, OUTPUTS // expected[0].numel())]
        parameters = list(model.get_submodule(name).parameters())
        replay = Replay(model, data, some)
        replay.seek(name)
        if not _affine(replay, parameters):
            return None
        before = divergence(_outputs(model, data, held_out), expected)
        start = [p.detach().clone() for p in parameters]
        targets = [y.float().softmax(1) for y in _outputs(original, data, some)]
        _minimise(replay, targets, parameters)
        after = divergence(_outputs(model, data, held_out), expected)
        if after < before:
            return before, after
        for p, value in zip(parameters, start):
            p.copy_(value)
    return before, before


def _minimise(replay: Replay, targets: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    flags = [(p, p.requires_grad) for p in replay.model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")
    count = sum(len(target) for target in targets)

    def closure() -> Any:
        optimizer.zero_grad()
        total = torch.zeros(())
        for i, target in enumerate(targets):
            with torch.enable_grad():
                logs = logits_of(replay.run(i, gradients=True)).float().log_softmax(1)
                loss = -(target * logs).sum() / count
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().cpu()
        return total

    try:
        optimizer.step(closure)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None


def _affine(replay: Replay, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the outputs of the first batch change twice as much when the parameters do."""
    start = [p.detach().clone() for p in parameters]
    steps = [torch.linspace(0.5, -0.5, p.numel(), dtype=p.dtype, device=p.device).view(p.shape) for p in parameters]
    found = []
    for factor in (0, 1, 2):
        for p, value, step in zip(parameters, start, steps):
            p.copy_(value + factor * step)
        found.append(logits_of(replay.run(0)).double())
    for p, value in zip(parameters, start):
        p.copy_(value)
    once, twice = found[1] - found[0], found[2] - found[0]
    return float((twice - 2 * once).abs().max()) <= TOLERANCE * float(twice.abs().max())


def _outputs(model: nn.Module, data: Data, batches: Sequence[Batch]) -> list[Tensor]:
    return [logits_of(data.forward(model, batch)) for batch in batches]
