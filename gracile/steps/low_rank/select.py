"""Layers that may be factorized: which, of what sizes, and why the others may not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import NothingChangedError
from gracile.graph import LayerInfo, Trace, check_change
from gracile.modes import eval_mode
from gracile.nn import Factorized, QuantizedLayer, compose, factorized_kind
from gracile.recipe import Recorder
from gracile.select import Select
from gracile.sharing import share_parameters
from gracile.solvers.spatial_low_rank import left_out
from gracile.stats.refit import refittable
from gracile.steps.pruning.consumers import tied_layers
from gracile.surgery import Swap, apply

if TYPE_CHECKING:
    from gracile.steps.factorize import Factorize

Run = Callable[[nn.Module], Any]


class Rank(NamedTuple):
    """What a layer is factorized to. spatial: split along the sides of its kernel, and not behind the whole kernel."""

    value: int
    spatial: bool = False

    def __str__(self) -> str:
        return f"{self.value} along the sides" if self.spatial else str(self.value)


@dataclass(frozen=True)
class Candidate:
    """A layer that may be factorized, of outputs · inputs weights.

    inputs: columns of the unfolded weight. macs: multiply-accumulates of one example. element_bytes: of one weight.
    kernel: (rows, columns) of a convolution that may also be split along the sides of its kernel, which are i, of the
        first of both, and j; None for other layers. transposed: i are the columns. stretch: how many times as many
        positions the first of both has to compute as the second, where it still has the input's extent along j.
    """

    name: str
    kind: str
    outputs: int
    inputs: int
    macs: int
    element_bytes: int
    kernel: tuple[int, int] | None = None
    transposed: bool = False
    stretch: float = 1.0

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def forms(self) -> tuple[bool, ...]:
        """The values of `Rank.spatial` that it may take."""
        return (False,) if self.kernel is None else (False, True)

    def parts(self, spatial: bool) -> tuple[int, int]:
        """Weights of the first and of the second layer for each unit of rank; no rank is above the smaller."""
        if not spatial:
            return self.inputs, self.outputs
        assert self.kernel is not None
        j = self.kernel[0 if self.transposed else 1]
        return self.inputs // j, self.outputs * j

    def full_rank(self, spatial: bool = False) -> int:
        return min(self.parts(spatial))

    def weights_at(self, rank: Rank) -> int:
        """Weights of both factors."""
        return rank.value * sum(self.parts(rank.spatial))

    def macs_at(self, rank: Rank) -> float:
        """Multiply-accumulates of both for one example."""
        first, second = self.parts(rank.spatial)
        return self.macs / self.weights * rank.value * (first * (self.stretch if rank.spatial else 1.0) + second)

    def largest_rank(self, spatial: bool = False) -> int:
        """The largest rank of fewer weights than the layer has; 0 where there is none."""
        return min((self.weights - 1) // sum(self.parts(spatial)), self.full_rank(spatial))


def select_layers(
    model: nn.Module, traced: Trace, step: Factorize, context: Context, batches: Sequence[Any], recorder: Recorder
) -> list[Candidate]:
    """Selected layers that may be factorized, in the order of the forward; the others are recorded with their reason.

    batches: on which the model, all of these layers factorized at random, is proven to compute what it does with the
    products as weights (float64). Layers that do not pass are left out. Raises NothingChangedError where none is left.
    """
    select = (context.select or Select()).without(*step.exclude)
    weighted = _weighted(model)
    Select(exclude=step.exclude).check(weighted)
    chosen = {name: layer for name, layer in weighted.items() if select.matches(name)}
    tied = tied_layers(model)
    reasons = {name: _reason(name, layer, tied) for name, layer in chosen.items()}
    calls = _count_calls(model, [name for name, reason in reasons.items() if reason is None], context)
    reasons |= {name: _call_reason(model.get_submodule(name), found) for name, found in calls.items()}
    infos = {info.name: info for info in traced.layers}
    found = {}
    for name, layer in chosen.items():
        if reasons[name] is None and name not in infos:
            reasons[name] = "not called on the first calibration batch"
        if reasons[name] is None:
            found[name] = _candidate(name, layer, infos[name], step.spatial is not None)
            if max(map(found[name].largest_rank, found[name].forms)) < 1:
                reasons[name] = f"no rank has fewer weights than {found[name].outputs} x {found[name].inputs}"
    ordered = [found[info.name] for info in traced.layers if reasons.get(info.name, "") is None]
    failed = _prove(model, ordered, lambda net: [context.data.forward(net, batch) for batch in batches], context)
    for name, layer in chosen.items():
        reason = failed.get(name, reasons[name])
        if reason is not None:
            recorder.skip(name or "model", type(layer).__name__, reason)
    left = [candidate for candidate in ordered if candidate.name not in failed]
    if not left:
        rows = [f"{row.name}: {row.reason}" for row in recorder.layers[:5]]
        raise NothingChangedError(
            "Factorize: no layer can be factorized.\n  " + ("\n  ".join(rows) or "The selection holds none.")
        )
    return left


def swap_of(candidate: Candidate, rank: Rank) -> Swap:
    """The edit that puts two layers of this rank in place of the one."""
    kind = "FactorizedLinear" if candidate.kind == "Linear" else "FactorizedConv"
    side = {"split": "horizontal" if candidate.transposed else "vertical"} if rank.spatial else {}
    return Swap(candidate.name, kind, {"rank": rank.value} | side)


def factorize_at_random(
    model: nn.Module, ranks: Mapping[Candidate, Rank], generator: torch.Generator
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the model with random factors of these ranks, and the products of these by layer, float64."""
    trial, products = share_parameters(model), {}
    for candidate, rank in ranks.items():
        apply(trial, [swap_of(candidate, rank)])
        layer: Any = trial.get_submodule(candidate.name)
        shapes = [each.weight.shape for each in (layer.first, layer.second)]
        layer.set_factors(*(torch.randn(s, generator=generator) / s[1:].numel() ** 0.5 for s in shapes))
        products[candidate.name] = product_of(layer)
    return trial, products


def overwriting(value: Tensor) -> Callable[[Tensor], None]:
    """What sets a tensor to this value."""

    def overwrite(tensor: Tensor) -> None:
        tensor.copy_(value)

    return overwrite


def product_of(layer: Factorized) -> Tensor:
    """The layer's weight, multiplied in float64."""
    return compose(*(each.weight.detach().double() for each in (layer.first, layer.second)))


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight matrix, by name; those inside a factorized layer stand for nothing by themselves."""
    found = {}
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Factorized))
    for name, module in model.named_modules():
        own = any(p.ndim >= 2 for p in module.parameters(recurse=False))
        known = isinstance(module, (QuantizedLayer, Factorized)) or factorized_kind(module) is not None
        if (own or known) and not (inside and name.startswith(inside)) and ".parametrizations." not in f".{name}":
            found[name] = module
    return found


def _reason(name: str, layer: nn.Module, tied: Collection[str]) -> str | None:
    """Why a layer may not be factorized, as far as it can be seen without running it."""
    if isinstance(layer, Factorized):
        return "factorized already"
    if isinstance(layer, QuantizedLayer):
        return "quantized already: factorize first, then quantize"
    if getattr(layer, "groups", 1) != 1:
        return f"a convolution of {layer.groups} groups"
    if factorized_kind(layer) is None:
        return f"no factorized layer stands for one of type {type(layer).__name__}"
    if not name:
        return "the model is itself a layer; wrap it: nn.Sequential(model)"
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    if not layer._parameters["weight"].is_floating_point():  # type: ignore[union-attr]
        return f"its weight is {layer._parameters['weight'].dtype}"  # type: ignore[union-attr]
    if not refittable(layer):
        return f"the inputs of this {type(layer).__name__} are not unfolded: zero padding in 1 or 2 dimensions is"
    if name in tied:
        return "another module holds its weight too"
    return None


def _count_calls(model: nn.Module, names: Sequence[str], context: Context) -> dict[str, list[tuple[int, int]]]:
    """Layer -> for each calibration batch, how often it is called and how many axes its input has.

    0 axes: the input is given by keyword, or is no tensor.
    """
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def count(_module: nn.Module, args: Any, name: str = name) -> None:
            calls, _ = found[name][-1]
            found[name][-1] = calls + 1, args[0].ndim if args and isinstance(args[0], Tensor) else 0

        handles.append(model.get_submodule(name).register_forward_pre_hook(count))
    try:
        with eval_mode(model), torch.no_grad():
            for done, batch in enumerate(context.data.calibration_batches):
                for rows in found.values():
                    rows.append((0, 0))
                context.data.forward(model, batch)
                context.progress("layers", done + 1, None)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call_reason(layer: nn.Module, calls: Sequence[tuple[int, int]]) -> str | None:
    """Why a layer may not be factorized, by how it is called."""
    counts = {count for count, _ in calls}
    if counts == {0}:
        return "never called on the calibration batches: if its weight is used, then by another module's forward"
    if max(counts) > 1:
        return f"called {max(counts)} times in one forward"
    if 0 in counts:
        return "not called on every calibration batch"
    axes = {axes for _, axes in calls}
    expected = len(layer.kernel_size) + 2 if hasattr(layer, "kernel_size") else None  # type: ignore[arg-type]
    if 0 in axes or (expected is not None and axes != {expected}):
        return "its input has no batch axis, or is given by keyword"
    return None


def _candidate(name: str, layer: Any, info: LayerInfo, spatial: bool) -> Candidate:
    kind = "Linear" if isinstance(layer, nn.Linear) else f"Conv{len(layer.kernel_size)}d"
    weight = layer.weight
    plain = Candidate(name, kind, len(weight), weight[0].numel(), info.macs, weight.element_size())
    if not spatial or weight.ndim != 4 or 1 in layer.kernel_size:
        return plain
    rank = max(1, replace(plain, kernel=tuple(layer.kernel_size)).largest_rank(True) // 2)
    transposed = left_out(weight.detach(), rank, True) < left_out(weight.detach(), rank, False)
    along = -2 if transposed else -1
    stretch = info.input_shape[along] / info.output_shape[along]
    return replace(plain, kernel=tuple(layer.kernel_size), transposed=transposed, stretch=stretch)


def _largest(candidate: Candidate, spatial: bool) -> Rank:
    """The largest rank of this form, where the layer has it."""
    form = spatial and candidate.kernel is not None
    return Rank(max(1, candidate.largest_rank(form)), form)


def _prove(model: nn.Module, candidates: Sequence[Candidate], run: Run, context: Context) -> dict[str, str]:
    """Layer -> why it stays whole: with a factorized one in its place the model is not what it is with the product."""

    def reason(tried: Sequence[Candidate]) -> str | None:
        for spatial in {form for candidate in tried for form in candidate.forms}:
            ranks = {candidate: _largest(candidate, spatial) for candidate in tried}
            trial, products = factorize_at_random(model, ranks, context.generator("factors"))
            changes = {f"{name}.weight": overwriting(product) for name, product in products.items()}
            check = check_change(model, changes, trial, run, "factorized")
            if not check.exact:
                return check.reason
        return None

    if not candidates or reason(candidates) is None:
        return {}
    found = {candidate.name: reason([candidate]) for candidate in candidates}
    failed = {name: why for name, why in found.items() if why is not None}
    left = [candidate for candidate in candidates if candidate.name not in failed]
    together = reason(left) if left else None
    return failed if together is None else {**failed, **{candidate.name: together for candidate in left}}
