"""Layers of low rank: two thin ordinary layers in place of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import ArtifactError


class Factorized(nn.Module):
    """y = W₂ (W₁ x) + bias: the layer `first` to r outputs, without a bias, and then the layer `second`.

    Both are ordinary layers, and what holds for such holds for them. `weight` reads the weight of the layer that this
    one stands for, `bias` that of `second`, and sizes and settings are read under their usual names; they cannot be
    set.
    """

    first: Any  # a linear layer or a convolution, or what a later step puts in its place
    second: Any

    @property
    def weight(self) -> Tensor:
        """What both make together, [out, in] or [out, in, *kernel]."""
        return compose(self.first.weight, self.second.weight)

    @property
    def bias(self) -> Tensor | None:
        """[out], or None."""
        bias: Tensor | None = self.second.bias
        return bias

    def set_factors(self, first: Tensor, second: Tensor, bias: Tensor | None = None) -> None:
        """Store W₁ and W₂, each flattened behind its first dimension or not, and, unless None, the bias [out]."""
        with torch.no_grad():
            for layer, value in ((self.first, first), (self.second, second)):
                layer.weight.copy_(value.reshape(layer.weight.shape))
            if bias is not None:
                assert self.bias is not None, "the layer has no bias"
                self.bias.copy_(bias)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(input))
        return y

    def _take_over(self, old: Any) -> None:
        """The old layer's bias, and which parameters train; the factors are zero until they are set or loaded."""
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.weight).requires_grad_(old.weight.requires_grad)
        if old.bias is not None:
            with torch.no_grad():
                self.second.bias.copy_(old.bias)
            self.second.bias.requires_grad_(old.bias.requires_grad)


class FactorizedLinear(Factorized):
    """`nn.Linear` of rank r: [r, in], then [out, r]."""

    def __init__(self, old: nn.Linear, config: dict[str, Any]) -> None:
        """config: {"rank": r}."""
        super().__init__()
        rank, like = _rank(config), {"device": old.weight.device, "dtype": old.weight.dtype}
        self.first = nn.utils.skip_init(nn.Linear, old.in_features, rank, bias=False, **like)
        self.second = nn.utils.skip_init(nn.Linear, rank, old.out_features, bias=old.bias is not None, **like)
        self._take_over(old)

    @property
    def in_features(self) -> int:
        value: int = self.first.in_features
        return value

    @property
    def out_features(self) -> int:
        value: int = self.second.out_features
        return value


class FactorizedConv(Factorized):
    """An ungrouped convolution of 1 to 3 dimensions, of rank r.

    By default one like it to r channels, and then one of kernel 1. Of two dimensions, split along a side of its kernel:
    "vertical" is one of its rows, kernel (h, 1), to r channels, and then one of its columns, (1, w); "horizontal" the
    other way round.
    """

    def __init__(self, old: nn.Conv1d | nn.Conv2d | nn.Conv3d, config: dict[str, Any]) -> None:
        """config: {"rank": r}, and "split": "vertical" or "horizontal" where the kernel is split."""
        super().__init__()
        if old.groups != 1:
            raise ArtifactError(f"A FactorizedConv cannot stand for a convolution of {old.groups} groups.")
        kinds: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        dims = len(old.kernel_size)
        rank, kind = _rank(config), kinds[dims]
        first, second = _sides(config, dims)
        like = {"device": old.weight.device, "dtype": old.weight.dtype, "padding_mode": old.padding_mode}
        sizes = ((old.in_channels, rank, first, False), (rank, old.out_channels, second, old.bias is not None))
        self.first, self.second = (
            nn.utils.skip_init(kind, inputs, outputs, **_along(old, sides), bias=bias, **like)
            for inputs, outputs, sides, bias in sizes
        )
        self._take_over(old)

    @property
    def in_channels(self) -> int:
        value: int = self.first.in_channels
        return value

    @property
    def out_channels(self) -> int:
        value: int = self.second.out_channels
        return value

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return _larger(self.first.kernel_size, self.second.kernel_size)

    @property
    def stride(self) -> tuple[int, ...]:
        return _larger(self.first.stride, self.second.stride)

    @property
    def padding(self) -> str | tuple[int, ...]:
        first: str | tuple[int, ...] = self.first.padding
        return first if isinstance(first, str) else _larger(first, self.second.padding)

    @property
    def dilation(self) -> tuple[int, ...]:
        return _larger(self.first.dilation, self.second.dilation)

    @property
    def padding_mode(self) -> str:
        value: str = self.first.padding_mode
        return value

    @property
    def groups(self) -> int:
        return 1


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The weight [out, in, *kernel] of two layers, the first [r, in, *] and the second [out, r, *], of which at each
    kernel dimension one has the size 1."""
    return torch.einsum("or...,rc...->oc...", second, first)


def _sides(config: dict[str, Any], dims: int) -> tuple[set[int], set[int]]:
    """The kernel dimensions that the first and the second convolution keep."""
    split = config.get("split")
    if split is None:
        return set(range(dims)), set()
    if dims != 2 or split not in ("vertical", "horizontal"):
        raise ArtifactError(f"A convolution of {dims} dimensions cannot be split {split!r}.")
    return ({0}, {1}) if split == "vertical" else ({1}, {0})


def _along(old: Any, sides: set[int]) -> dict[str, Any]:
    """Settings of a convolution that does what the old one does along these dimensions, and nothing along others."""
    still = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    settings: dict[str, Any] = {
        name: tuple(value if dim in sides else nothing for dim, value in enumerate(getattr(old, name)))
        for name, nothing in still.items()
        if not isinstance(getattr(old, name), str)
    }
    return {"padding": old.padding} | settings  # "same" is so along dimensions without a kernel too


def _larger(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(max, first, second))


_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "FactorizedLinear",
    nn.Conv1d: "FactorizedConv",
    nn.Conv2d: "FactorizedConv",
    nn.Conv3d: "FactorizedConv",
}


def factorized_kind(layer: nn.Module) -> str | None:
    """Name of the class that can stand for a layer; None where there is none.

    A subclass with a forward of its own has none, and neither has a grouped convolution.
    """
    for base, kind in _KINDS.items():
        if isinstance(layer, base) and type(layer).forward is base.forward:
            return kind if getattr(layer, "groups", 1) == 1 else None
    return None


def _rank(config: dict[str, Any]) -> int:
    rank = config["rank"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ArtifactError(f"A layer cannot have the rank {rank!r}: a whole number of at least 1.")
    return rank
