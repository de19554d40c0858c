"""Gradients of the loss per example, of weights and of whole units: means, mean squares, the Hessian's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gracile.data import Batch, Data, batch_size, slice_batch
from gracile.errors import ConfigError, DataError
from gracile.layer_stats import GRADIENT_STATS, LayerStats
from gracile.modes import eval_mode
from gracile.patterns import Member


def collect_gradients(
    model: nn.Module,
    parameters: Collection[str],
    needs: Collection[str],
    data: Data,
    *,
    examples: int = 256,
    probes: int = 1,
    generator: torch.Generator | None = None,
    on_example: Callable[[int], None] | None = None,
) -> dict[str, LayerStats]:
    """Gradient statistics of the named parameters over the first `examples` training examples, by parameter name.

    gradient: mean of dL/dw. gradient_sq: mean of (dL/dw)² over single examples (one backward pass each: the mean
    square of batch gradients is another quantity). hessian_diagonal: E[v ⊙ ∇(∇L·v)] with v = ±1 (Hutchinson 1990),
    `probes` draws for each batch.

    The model is in eval mode (no dropout, stored batch-norm statistics) and as before afterwards. Raises DataError
    where `data.train` or `data.loss` is missing or a loss is not finite.
    """
    unknown = set(needs) - GRADIENT_STATS
    if unknown:
        raise ConfigError(f"Unknown gradient statistics: {', '.join(sorted(unknown))}.")
    with _differentiated(model, parameters, data) as wanted:
        sums, count = _first_order(model, wanted, needs, data, examples, on_example)
        if "hessian_diagonal" in needs:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                sums["hessian_diagonal"] = _hutchinson(model, wanted, data, examples, probes, generator)
    fields: dict[str, dict[str, Any]] = {name: {key: s[name] for key, s in sums.items()} for name in wanted}
    return {name: LayerStats(**values, examples=count) for name, values in fields.items()}


def collect_gates(
    model: nn.Module,
    gates: Mapping[str, Sequence[Member]],
    data: Data,
    *,
    examples: int = 256,
    on_example: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """E[(Σ_S w · dL/dw)²], S the weights that read a unit, the mean over the first `examples` training examples.

    gates: group -> the axes of parameters that read its units. Returns [units] float64 by group. The inner sum is the
    derivative of the loss by a factor on all that the unit passes on, at 1; of a weight that is used twice, both uses
    count. Model and errors as for `collect_gradients`.
    """
    total: dict[str, Tensor] = {}
    count = 0
    with _differentiated(model, {m.tensor for members in gates.values() for m in members}, data) as wanted:
        for piece in _pieces(data, examples, 1):
            gradients = _gradients(_loss(model, data, piece), wanted)
            for group, members in gates.items():
                slopes = torch.stack([_slopes(wanted[m.tensor], gradients[m.tensor], m) for m in members]).sum(0)
                total[group] = total.get(group, 0) + slopes.square()
            count += 1
            if on_example is not None:
                on_example(count)
    if count == 0:
        raise DataError("The training data hold no batches.")
    return {group: value / count for group, value in total.items()}


def _slopes(weight: Tensor, gradient: Tensor, member: Member) -> Tensor:
    """Σ w · g over what belongs to each unit: [units] float64."""
    products = (weight.detach().double() * gradient.double()).movedim(member.axis, 0).flatten(1).sum(1)
    return products[member.positions.to(products.device)].sum(1)


@contextmanager
def _differentiated(model: nn.Module, parameters: Collection[str], data: Data) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters, which alone require gradients within the context; the model is in eval mode."""
    if data.train is None or data.loss is None:
        raise DataError(
            "A criterion that needs gradients needs labelled data and a loss.\n"
            "  Pass Data(train=..., loss=gracile.losses.cross_entropy), or use Magnitude(), which needs neither."
        )
    tensors = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: tensors[name] for name in parameters}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.requires_grad_(any(p is w for w in wanted.values()))
    try:
        with eval_mode(model), torch.enable_grad():
            yield wanted
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


def _first_order(
    model: nn.Module,
    wanted: dict[str, nn.Parameter],
    needs: Collection[str],
    data: Data,
    examples: int,
    on_example: Callable[[int], None] | None,
) -> tuple[dict[str, dict[str, Tensor]], int]:
    keys = [key for key in ("gradient", "gradient_sq") if key in needs]
    sums = {key: {name: torch.zeros_like(p, dtype=torch.float32) for name, p in wanted.items()} for key in keys}
    count = 0
    size = 1 if "gradient_sq" in needs else None
    for piece in _pieces(data, examples if keys else 0, size):
        gradients = _gradients(_loss(model, data, piece), wanted)
        weight = batch_size(piece)
        for name, g in gradients.items():
            if "gradient" in sums:
                sums["gradient"][name] += weight * g
            if "gradient_sq" in sums:
                sums["gradient_sq"][name] += g.square()
        count += weight
        if on_example is not None:
            on_example(count)
    if keys and count == 0:
        raise DataError("The training data hold no batches.")
    return {key: {name: total / count for name, total in s.items()} for key, s in sums.items()}, count


def _hutchinson(
    model: nn.Module,
    wanted: dict[str, nn.Parameter],
    data: Data,
    examples: int,
    probes: int,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in wanted.items()}
    count = 0
    for piece in _pieces(data, examples, None):
        weight = batch_size(piece)
        loss = _loss(model, data, piece)
        gradients = torch.autograd.grad(loss, list(wanted.values()), create_graph=True, materialize_grads=True)
        curved = [i for i, g in enumerate(gradients) if g.requires_grad]  # others do not depend on any weight
        for _ in range(probes):
            signs = [torch.randint(0, 2, g.shape, generator=generator).to(g).mul_(2).sub_(1) for g in gradients]
            if not curved:
                continue
            products = torch.autograd.grad(
                [gradients[i] for i in curved],
                list(wanted.values()),
                [signs[i] for i in curved],
                retain_graph=True,
                materialize_grads=True,
            )
            for name, v, hv in zip(wanted, signs, products):
                total[name] += weight / probes * (v * hv).float()
        count += weight
    if count == 0:
        raise DataError("The training data hold no batches.")
    return {name: value / count for name, value in total.items()}


def _pieces(data: Data, examples: int, size: int | None) -> Any:
    """The first `examples` training examples, in whole batches cut to fit, or in pieces of `size`."""
    left = examples
    for batch in data.train or ():
        if left <= 0:
            return
        n = min(batch_size(batch), left)
        for start in range(0, n, size or n):
            yield slice_batch(batch, start, min(start + (size or n), n))
        left -= n


def _loss(model: nn.Module, data: Data, batch: Batch) -> Tensor:
    assert data.loss is not None
    loss = data.loss(data.forward(model, batch), batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(f"Data(loss=...): expected a scalar tensor, got {type(loss).__name__}.")
    if not torch.isfinite(loss):
        raise DataError("Data(loss=...): the loss is not finite on a training batch. Check labels and inputs.")
    return loss.reshape(())


def _gradients(loss: Tensor, wanted: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return {name: g.float() for name, g in zip(wanted, gradients)}
