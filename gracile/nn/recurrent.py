"""Recurrent layers with encoded weights: LSTM, GRU and plain RNN, of any depth and both directions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from gracile.errors import ConfigError
from gracile.formats import Format
from gracile.nn.dynamic_lstm import run_dynamic_lstm
from gracile.nn.quantized import QuantizedLayer

_SETTINGS = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "nonlinearity",
)


class EncodedWeight(QuantizedLayer):
    """One weight of a recurrent layer, a row for each gate of each unit, as its format encodes it."""

    def __init__(self, weight: Tensor, config: dict[str, Any]) -> None:
        super().__init__(SimpleNamespace(weight=weight, bias=None), config)  # type: ignore[arg-type]


class QuantizedRecurrent(nn.RNNBase):
    """The float layer's own forward on decoded weights; biases, and all but in dynamic LSTMs inputs and states, stay in
    floating point.

    encoded: an `EncodedWeight` for each matrix, by its name in the layer (weight_ih_l0, weight_hh_l0, ...). These names
    still read the decoded matrices; biases are parameters under theirs.
    """

    encoded: nn.ModuleDict

    def __init__(self, old: Any, config: dict[str, Any]) -> None:
        """config: {"weight": format}, of all matrices; {"sparse": [names]} of those that were pruned before; of an LSTM
        without projections {"dynamic": true} rounds inputs and states to 8 bits as they come (`run_dynamic_lstm`).
        """
        nn.Module.__init__(self)
        if config.get("input") is not None or config.get("output") is not None:
            raise ConfigError("Inputs and states of a recurrent layer stay in floating point: leave their formats out.")
        for name in _SETTINGS:
            if hasattr(old, name):
                setattr(self, name, getattr(old, name))
        names = list(old._flat_weights_names)
        matrices = [name for name in names if getattr(old, name).ndim == 2]
        settings = {name: {**config, "sparse": name in config.get("sparse", ())} for name in matrices}
        self.encoded = nn.ModuleDict({name: EncodedWeight(getattr(old, name), settings[name]) for name in matrices})
        for name in names:
            if name not in matrices:
                bias: Tensor = getattr(old, name)
                self.register_parameter(name, nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad))
        self._all_weights = old._all_weights
        self.dynamic = bool(config.get("dynamic"))
        if self.dynamic and not can_be_dynamic(self):
            raise ConfigError("Only an LSTM without projections takes inputs and states on grids found as it runs.")
        self.__dict__["_flat_weights_names"] = names

    def __getattr__(self, name: str) -> Any:
        encoded = self.__dict__.get("_modules", {}).get("encoded")
        if encoded is not None and name in encoded:
            return encoded[name].decoded_weight()
        return super().__getattr__(name)

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        return [getattr(self, name) for name in self._flat_weights_names]

    def _update_flat_weights(self) -> None:
        """Nothing is cached."""

    def flatten_parameters(self) -> None:
        """Nothing is laid out for cuDNN: the weights are decoded anew."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def to_float(self) -> nn.RNNBase:
        """The float layer of the decoded weights."""
        settings = {name: getattr(self, name) for name in _SETTINGS if name != "mode" and hasattr(self, name)}
        for name, default in (("proj_size", 0), ("nonlinearity", "tanh")):
            if settings.get(name, default) == default:
                settings.pop(name, None)
        base = next(base for base in _KINDS if isinstance(self, base))
        weights = dict(zip(self._flat_weights_names, self._flat_weights))
        layer: nn.RNNBase = base(**settings, dtype=next(iter(weights.values())).dtype)  # type: ignore[assignment]
        layer.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
        return layer.train(self.training)

    @property
    def weight_format(self) -> Format:
        """Of all matrices."""
        fmt: Format = next(iter(self.encoded.values())).weight_format  # type: ignore[union-attr,assignment]
        return fmt

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_format}" + (", dynamic" if self.dynamic else "")


class QuantizedLSTM(QuantizedRecurrent, nn.LSTM):
    """`nn.LSTM` with encoded weights."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As `nn.LSTM`."""
        return run_dynamic_lstm(self, input, hx) if self.dynamic else super().forward(input, hx)


class QuantizedGRU(QuantizedRecurrent, nn.GRU):
    """`nn.GRU` with encoded weights."""


class QuantizedRNN(QuantizedRecurrent, nn.RNN):
    """`nn.RNN` with encoded weights."""


_KINDS: dict[type[nn.Module], str] = {nn.LSTM: "QuantizedLSTM", nn.GRU: "QuantizedGRU", nn.RNN: "QuantizedRNN"}


def can_be_dynamic(layer: nn.Module) -> bool:
    """Whether there is a kernel with integer products for such a recurrent layer: an LSTM without projections."""
    return isinstance(layer, nn.LSTM) and not layer.proj_size


def recurrent_kind(layer: nn.Module) -> str | None:
    """Name of the quantized class that can stand for a recurrent layer; None where there is none."""
    for base, kind in _KINDS.items():
        if isinstance(layer, base) and not isinstance(layer, QuantizedRecurrent):
            return kind if type(layer).forward is base.forward else None
    return None
