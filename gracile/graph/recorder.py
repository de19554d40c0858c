"""The dispatch mode under which a model is traced: every operator's tensors get axis expressions, by the rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gracile.graph.axes import Expr, freeze, fresh, mark_inexact, resolve, size
from gracile.graph.identity import Identity
from gracile.graph.integers import Constraint
from gracile.graph.values import NOWHERE, Axis, Event, MacTerm, Value, storage_of, tensors_in

logger = logging.getLogger(__name__)


class Unfollowed(Exception):
    """Raised by a rule for a use of its operator that it cannot follow; the message is the reason for freezing."""


@dataclass
class Call:
    """One operator run, as its rule sees it."""

    name: str
    arguments: dict[str, Any]
    output: Any
    recorder: Recorder

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        return self.arguments.get(name)

    def value(self, tensor: Tensor) -> Value:
        return self.recorder.value(tensor)

    def dims(self, tensor: Tensor) -> list[Expr]:
        return self.recorder.value(tensor).dims

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return list(tensors_in(list(self.arguments.values())))

    @property
    def outputs(self) -> list[Tensor]:
        return list(tensors_in(self.output))

    def set(
        self,
        output: Tensor,
        dims: Sequence[Expr],
        sources: Sequence[frozenset[Axis]] | None = None,
        is_weight: bool = False,
    ) -> None:
        """Give the output its dimensions; without `sources` it holds no parameter's entries."""
        known = list(sources) if sources is not None and is_weight else [NOWHERE] * len(dims)
        self.recorder.store(output, Value(list(dims), known, is_weight))

    def freeze_all(self, reason: str) -> None:
        """Freeze every dimension of every tensor involved."""
        for tensor in self.tensors:
            for dim in self.dims(tensor):
                freeze(dim, reason)
        for output in self.outputs:
            self.set(output, [fresh(n, reason) for n in output.shape])


#: What an operator does to axes.
Rule = Callable[[Call], None]


class Recorder(TorchDispatchMode):
    """Runs every operator and then its rule, which ties the axes of what went in and came out.

    Tensors are let go as soon as the model lets them go: of a large one, only what is in use takes memory.
    """

    def __init__(self, model: nn.Module, rule_for: Callable[[str, Any], Rule | None]) -> None:
        super().__init__()
        self._rule_for = rule_for
        self._identity = Identity(self._forget)
        self._values: dict[int, Value] = {}
        self._deferred: dict[int, Callable[[], Value]] = {}
        self._zeros: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self.axes: dict[str, list[Expr]] = {}
        self.ids: dict[str, int] = {}
        self.call_order: list[str] = []
        self.constraints: list[Constraint] = []
        self.mac_terms: list[MacTerm] = []
        self.events: list[Event] = []
        self.consumers: set[Axis] = set()
        self.producers: set[Axis] = set()
        self.losing: dict[Axis, str] = {}  # axes of parameters whose zeros an operator made into something else
        self.directions: set[Axis] = set()  # divided by their own norm, so that zeros there give no zeros
        self.layers: list[str] = []  # those with parameters of their own that are running, outermost first
        self.modules: list[str] = []  # all modules that are running
        self.unknown: dict[str, int] = {}
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            dims = [fresh(n) for n in tensor.shape]
            self.axes[name] = dims
            self.ids[name] = self._identity.number(tensor)
            sources = [frozenset({(name, axis)}) for axis in range(tensor.ndim)]
            self.store(tensor, Value(list(dims), sources, True))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and guarding against it would import the compiler, which takes seconds."""
        return False

    def value(self, tensor: Tensor, reason: str = "it comes from a tensor that is no parameter or buffer") -> Value:
        """What is known of the tensor; one never seen before is frozen, for the reason given."""
        number = self._identity.number(tensor)
        if number in self._deferred:
            self.store(tensor, self._deferred.pop(number)())
        value = self._values.get(number)
        if value is None:
            value = Value([fresh(n, reason) for n in tensor.shape], [NOWHERE] * tensor.ndim)
            self.store(tensor, value)
        value.dims = [resolve(dim) for dim in value.dims]
        return value

    def store(self, tensor: Tensor, value: Value) -> None:
        self._values[self._identity.number(tensor)] = value

    def defer(self, tensor: Tensor, value: Callable[[], Value]) -> None:
        """Ask what is known of the tensor only when something reads it, for that may tie axes."""
        self._deferred[self._identity.number(tensor)] = value

    def _hold_data(self, written: Tensor) -> None:
        """Data were written to the tensor, so that whatever shares its memory is no longer made of weights alone."""
        where = storage_of(written)
        for number, value in list(self._values.items()):
            tensor = self._identity.tensor(number) if value.is_weight and where is not None else None
            if tensor is not None and storage_of(tensor) == where:
                value.is_weight = False
                value.sources = [NOWHERE] * len(value.sources)

    def _forget(self, number: int) -> None:
        for known in (self._values, self._deferred, self._zeros, self._versions):
            known.pop(number, None)

    def note_zeros(self, tensor: Tensor) -> None:
        """The tensor was just made of zeros alone."""
        self._zeros[self._identity.number(tensor)] = tensor._version

    def is_zeros(self, tensor: Tensor) -> bool:
        """Whether the tensor was made of zeros alone, and neither it nor a view of it was written to since."""
        return self._zeros.get(self._identity.number(tensor)) == tensor._version

    def state(self, tensor: Tensor) -> tuple[int, int]:
        """Identity of the tensor's present content."""
        number = self._identity.number(tensor)
        return number, self._versions.get(number, 0)

    def take_inputs(self, tree: Any, reason: str) -> None:
        """Make the tensors in a nested structure data with fixed dimensions, whatever made them."""
        self.freeze_tensors(tree, reason)
        for tensor in tensors_in(tree):
            if self._identity.number(tensor) not in self.ids.values():
                self.store(tensor, Value([fresh(n, reason) for n in tensor.shape], [NOWHERE] * tensor.ndim))

    def freeze_tensors(self, tree: Any, reason: str) -> None:
        """Freeze all dimensions of the tensors in a nested structure."""
        for tensor in tensors_in(tree):
            for dim in self.value(tensor, reason).dims:
                freeze(dim, reason)

    def contract(self, value: Value, dim: int) -> None:
        """Note that a weight's dimension is summed over against another tensor: it consumes what it is tied to."""
        self.consumers |= value.sources[dim]
        for axis in value.sources[dim] & self.losing.keys():
            mark_inexact(value.dims[dim], self.losing[axis])

    def lose_zeros(self, value: Value, reason: str) -> None:
        """Note that zeros in the parameters behind a weight give no zeros in it: it shows where that is summed over."""
        for axis in NOWHERE.union(*value.sources):
            self.losing.setdefault(axis, reason)

    def produce(self, value: Value, dim: int) -> None:
        """Note that a weight's dimension becomes a layer's output dimension."""
        self.producers |= value.sources[dim]

    def count(self, *dims: Expr) -> None:
        """Count multiply-accumulates for the layer that is running."""
        self.mac_terms.append(MacTerm(self.layers[-1] if self.layers else "", tuple(f for dim in dims for f in dim)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        mutable = func._schema.is_mutable
        if mutable and not name.startswith("_"):
            name = name.rstrip("_")
        call = Call(name, _bind(func, args, kwargs), output, self)
        reads = tuple(self.state(tensor) for tensor in call.tensors)
        self._run_rule(call, func)
        if mutable:
            for out in call.outputs:
                number, version = self.state(out)
                self._versions[number] = version + 1
                if not self.value(out).is_weight:
                    self._hold_data(out)
        makes = tuple(self.state(tensor) for tensor in call.outputs)
        self.events.append(Event(name, self.layers[-1] if self.layers else None, reads, makes))
        return output

    def _run_rule(self, call: Call, func: Any) -> None:
        rule = self._rule_for(call.name, func)
        if rule is None:
            self.unknown[call.name] = self.unknown.get(call.name, 0) + 1
            call.freeze_all(f"the operator '{call.name}' has no rule")
            return
        try:
            rule(call)
        except Unfollowed as reason:
            call.freeze_all(str(reason))
            return
        except Exception as error:  # a form of the operator that its rule did not foresee must not stop the trace
            logger.debug("rule of %s failed: %r", call.name, error)
            call.freeze_all(f"the operator '{call.name}' is used in a form that has no rule")
            return
        for output in call.outputs:
            value = self._values.get(self._identity.number(output))
            sizes = [size(dim) for dim in value.dims] if value is not None else None
            if sizes != list(output.shape):
                logger.debug("rule of %s gave sizes %s for %s", call.name, sizes, tuple(output.shape))
                call.freeze_all(f"the operator '{call.name}' is used in a form that has no rule")
                return


def _bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the schema's defaults."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
