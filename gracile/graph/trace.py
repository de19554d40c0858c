"""Run a model once and learn its layers, their costs, and which tensor axes are tied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gracile.errors import ConfigError, ModelError
from gracile.graph.attributes import traced_attributes
from gracile.graph.axes import Atom, Expr, mark_kind, size
from gracile.graph.declared import declared_constraints
from gracile.graph.flow import Flow
from gracile.graph.groups import Group, build_groups, settle
from gracile.graph.layerwise import Layerwise
from gracile.graph.provenance import Provenance
from gracile.graph.recorder import Recorder
from gracile.graph.rules import rule_for
from gracile.graph.solve import Solver
from gracile.graph.values import Axis, MacTerm, tensors_in
from gracile.modes import unchanged

FROM_INPUT = "it comes from the model's input"
TO_OUTPUT = "it reaches the model's output"


@dataclass(frozen=True)
class LayerInfo:
    """A module with parameters of its own that ran, and calls no other such module.

    kind: its class name. input_shape, output_shape: of its first call, with the batch. parameters: how many numbers.
    macs: multiply-accumulates per example. calls: how often it ran in one forward.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    calls: int


@dataclass(frozen=True, eq=False)
class Trace:
    """What one run of a model showed: layers in the order they ran, cost, and groups of tied axes.

    macs: multiply-accumulates per example of convolutions, matrix products, attention and recurrent layers.
    groups: both those that can be cut and the frozen ones, with the reason.
    """

    layers: tuple[LayerInfo, ...]
    macs: int
    groups: tuple[Group, ...]
    flow: Flow = field(repr=False)
    atoms: Mapping[str, Atom] = field(repr=False)
    axes: Mapping[str, list[Expr]] = field(repr=False)
    solver: Solver = field(repr=False)
    sequences: Mapping[str, tuple[int, ...]] = field(repr=False)
    mac_terms: tuple[MacTerm, ...] = field(repr=False)
    batch_size: int = 1
    unknown_operators: tuple[str, ...] = ()
    directions: frozenset[Axis] = frozenset()

    def group(self, name: str) -> Group:
        """The group of that name; raises ConfigError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(g.name for g in self.groups if g.frozen is None) or "none"
        raise ConfigError(f"The model has no group '{name}'.\n  Groups that can be cut: {known}.")

    def batch_norm_pairs(self) -> list[tuple[str, str]]:
        """(convolution or linear layer, batch norm) where the norm alone reads exactly that layer's output."""
        return self.flow.batch_norm_pairs()

    def homogeneous_pairs(self) -> list[tuple[str, str]]:
        """(layer, layer that alone reads it) with nothing between them that scaling a channel would change."""
        return self.flow.homogeneous_pairs()

    def consumers(self, layer: str) -> tuple[str, ...]:
        """What reads the layer's output: "module:<name>" for a layer, else the operator's name ("add", "cat")."""
        return self.flow.consumers(layer)

    def consumers_behind(self, layer: str, operators: Collection[str]) -> tuple[str, ...]:
        """What reads the layer's output or what these operators and copies make of it, named as in `consumers`."""
        return self.flow.consumers_behind(layer, operators)

    def feeds_sum(self, layer: str) -> bool:
        """Whether the output goes into an addition or a concatenation, through no more than batch norm or copies."""
        return self.flow.feeds_sum(layer)


def trace(model: nn.Module, run: Callable[[nn.Module], Any]) -> Trace:
    """Run the model once on the batch that `run` feeds it, and learn layers, costs and tied axes.

    The model runs in eval mode with gradients enabled and is left as it was. An operator without a rule freezes the
    axes that it touches. Raises ModelError if the model does not run.

    What the model no longer reads is let go while it runs, what gradients would need too; a model that takes gradients
    in its forward is run once more, with all of that kept.
    """
    try:
        return _trace(model, run, saved_tensors_hooks(lambda _tensor: None, _refuse))
    except _GradientError:
        return _trace(model, run, nullcontext())


class _GradientError(Exception):
    """A tensor was let go that the model's forward takes gradients by."""


def _refuse(_nothing: None) -> Tensor:
    raise _GradientError


def _trace(model: nn.Module, run: Callable[[nn.Module], Any], saving: AbstractContextManager[Any]) -> Trace:
    recorder = Recorder(model, rule_for)
    watch = _Watch(model, recorder)
    provenance = Provenance(recorder)
    with unchanged(model), watch.hooks(), traced_attributes(model, provenance.equal) as sequences:
        try:
            with torch.enable_grad(), saving, recorder, provenance, Layerwise(recorder):
                run(model)
        except _GradientError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run on the batch given: {type(error).__name__}: {error}\n"
                f"  Check that the batch (or Data(feed=...)) holds what its forward expects."
            ) from error
    if not watch.seen_input:
        raise ModelError(f"{type(model).__name__} was never called: `run` must call the model it is given.")
    recorder.call_order = list(watch.calls)
    for name, dims in recorder.axes.items():
        if ".weight_hh" in f".{name}" and isinstance(watch.owner(name), (nn.RNNBase, nn.RNNCellBase)):
            mark_kind(dims[1], "hidden")
    recorder.constraints.extend(declared_constraints(model, recorder.axes))
    ties = settle(recorder, Solver(recorder.constraints))
    solver = Solver(recorder.constraints)
    found = build_groups(recorder, ties)
    terms = tuple(recorder.mac_terms)
    return Trace(
        layers=watch.layers(terms),
        macs=sum(size(term.volume) for term in terms) // watch.batch_size,
        groups=tuple(group for group, _ in found),
        flow=Flow(recorder.events, watch.outputs, watch.inputs, watch.kinds(), watch.returned),
        atoms={group.name: atom for group, atom in found},
        axes=recorder.axes,
        solver=solver,
        sequences=sequences,
        mac_terms=terms,
        batch_size=watch.batch_size,
        unknown_operators=tuple(sorted(recorder.unknown)),
        directions=frozenset(recorder.directions),
    )


class _Watch:
    """Hooks that tell which layer is running and what goes in and out of it."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.model = model
        self.recorder = recorder
        self.names = {m: n for n, m in model.named_modules()}
        self.owners = {m: n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
        self.calls: dict[str, int] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.inputs: dict[str, list[tuple[int, int]]] = {}
        self.outputs: dict[str, list[tuple[int, int]]] = {}
        self.returned: set[tuple[int, int]] = set()
        self.parents: set[str] = set()
        self.batch_size = 1
        self.seen_input = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            root = self.model.register_forward_pre_hook(self._enter_root, with_kwargs=True, prepend=True)
            stack.callback(root.remove)
            for module in self.names:
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(self._leave, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.callback(self.model.register_forward_hook(self._leave_root).remove)
            yield

    def _enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen_input = True
        self.recorder.take_inputs((args, kwargs), FROM_INPUT)
        for tensor in tensors_in((args, kwargs)):
            if tensor.dim() > 0:
                self.batch_size = max(int(_shape(tensor)[0]), 1)
                break

    def _leave_root(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            self.returned.add(self.recorder.state(tensor))
        self.recorder.freeze_tensors(output, TO_OUTPUT)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.recorder.modules.append(self.names[module])
        if module not in self.owners:
            return
        name = self.owners[module]
        self.parents.update(self.recorder.layers)
        self.recorder.layers.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        first = next(tensors_in((args, kwargs)), None)
        if first is not None:
            self.inputs.setdefault(name, []).append(self.recorder.state(first))
            self.shapes.setdefault(name, (_shape(first), ()))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.recorder.modules.pop()
        if module not in self.owners:
            return
        name = self.owners[module]
        self.recorder.layers.pop()
        first = next(tensors_in(output), None)
        if first is not None:
            self.outputs.setdefault(name, []).append(self.recorder.state(first))
            entered = self.shapes.get(name, ((), ()))
            if not entered[1]:
                self.shapes[name] = (entered[0], _shape(first))

    def owner(self, parameter: str) -> nn.Module:
        """The module that holds the parameter."""
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def kinds(self) -> dict[str, nn.Module]:
        """The layers that ran, by name."""
        return {name: module for module, name in self.owners.items() if name in self.calls and name not in self.parents}

    def layers(self, terms: tuple[MacTerm, ...]) -> tuple[LayerInfo, ...]:
        macs: dict[str, int] = {}
        for term in terms:
            macs[term.layer] = macs.get(term.layer, 0) + size(term.volume)
        modules = self.kinds()
        return tuple(
            LayerInfo(
                name=name,
                kind=type(modules[name]).__name__,
                input_shape=self.shapes.get(name, ((), ()))[0],
                output_shape=self.shapes.get(name, ((), ()))[1],
                parameters=sum(p.numel() for p in modules[name].parameters()),
                macs=macs.get(name, 0) // self.batch_size,
                calls=calls,
            )
            for name, calls in self.calls.items()
            if name in modules
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(map(int, tensor.shape))
