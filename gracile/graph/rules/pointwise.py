"""Elementwise operators, with broadcasting."""

from __future__ import annotations

from torch import Tensor

from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import broadcast, follow
from gracile.graph.values import Value


def pointwise(call: Call) -> None:
    """Every output dimension is that of the operands there."""
    values = [call.value(tensor) for tensor in call.tensors]
    for output in call.outputs:
        dims, sources, is_weight = broadcast(values, output.shape)
        if is_weight and not _keeps_zero(call):
            reason = f"a parameter passes '{call.name}', which does not keep zeros"
            call.recorder.lose_zeros(Value(dims, sources, True), reason)
        call.set(output, dims, sources, is_weight)


def _keeps_zero(call: Call) -> bool:
    """Whether zero parameters give zeros, so that zeroing them is zeroing what they become."""
    numbers = [call.get(name) for name in ("other", "exponent") if not isinstance(call.get(name), Tensor)]
    if call.name in ("add", "sub", "rsub"):
        return not any(numbers)
    if call.name == "pow":
        return bool(numbers) and isinstance(numbers[0], (int, float)) and numbers[0] > 0
    return call.name in _ZERO_TO_ZERO.split()


def same_as_first(call: Call) -> None:
    """Outputs shaped like the first tensor are its copies."""
    first = call.tensors[0]
    for output in call.outputs:
        if output.shape == first.shape:
            follow(call, output, first)


def copy_into(call: Call) -> None:
    """`self` and what is written into it share their axes."""
    target, source = call["self"], call["src"]
    dims, _, _ = broadcast([call.value(target), call.value(source)], target.shape)
    call.set(target, dims)


def to_python(call: Call) -> None:
    """A number read from a tensor leaves no axis behind."""
    assert not isinstance(call.output, Tensor)


_ELEMENTWISE = (
    "add sub rsub mul div pow neg abs exp log sqrt rsqrt reciprocal sigmoid tanh relu gelu silu mish elu selu celu "
    "hardtanh hardswish hardsigmoid leaky_relu softplus erf where masked_fill clamp clamp_min clamp_max maximum "
    "minimum eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not "
    "isnan isinf isfinite lerp addcmul addcdiv sign floor ceil round trunc remainder fmod atan2 threshold prelu "
    "_prelu_kernel log_sigmoid_forward nan_to_num square fill zero native_dropout copysign heaviside rrelu_with_noise"
)
_ZERO_TO_ZERO = (
    "mul div neg abs sqrt tanh relu gelu silu mish elu selu celu hardtanh hardswish leaky_relu erf sign round floor "
    "ceil trunc square fill zero native_dropout masked_fill where"
)
_COPIES = (
    "clone alias _to_copy contiguous dropout lift_fresh lift_fresh_copy positive view_as_real_copy "
    "_conj conj resolve_conj bernoulli requires_grad"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), pointwise),
    **dict.fromkeys(_COPIES.split(), same_as_first),
    "copy": copy_into,
    "_local_scalar_dense": to_python,
    "is_nonzero": to_python,
    "equal": to_python,
}
