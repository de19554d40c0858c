"""Recurrent layers that the dispatcher keeps whole."""

from __future__ import annotations

from gracile.graph.algebra import unify
from gracile.graph.axes import COUNTS_GATES, Expr, fresh, mark_kind, size
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import meet


def lstm_layer(call: Call) -> None:
    """One layer and direction of an LSTM: weights [4·hidden, in] and [4·hidden, hidden], states [batch, hidden]."""
    x = call.dims(call["input"])
    inputs, hidden_weight = call.value(call["weight0"]), call.value(call["weight1"])
    hidden = hidden_weight.dims[1]
    gates: Expr = (*fresh(size(inputs.dims[0]) // size(hidden), COUNTS_GATES), *hidden)
    biases = [call.dims(call[name])[0] for name in ("weight2", "weight3") if call.get(name) is not None]
    for dim in (inputs.dims[0], hidden_weight.dims[0], *biases):
        if size(dim) == size(gates):
            unify(dim, gates)
    summed = meet(x[-1], inputs.dims[1])
    for value in (inputs, hidden_weight):
        call.recorder.contract(value, 1)
        call.recorder.produce(value, 0)
    for name in ("hx_", "cx_"):
        unify(call.dims(call[name])[-1], hidden)
    mark_kind(hidden, "hidden")
    call.recorder.count(*x[:-1], gates, summed)
    call.recorder.count(*x[:-1], gates, hidden)
    output, *states = call.outputs
    call.set(output, [*x[:-1], hidden])
    for state in states:
        if state.ndim and state.shape[-1] == size(hidden):
            call.set(state, [*(fresh(n, "it counts examples") for n in state.shape[:-1]), hidden])
        else:
            call.set(state, [fresh(n, "it is workspace of a recurrent layer") for n in state.shape])


RULES: dict[str, Rule] = {"mkldnn_rnn_layer": lstm_layer}
