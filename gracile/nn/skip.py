"""What stands where a residual block was: its input, handed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Skip(nn.Module):
    """y = x, the first tensor among the arguments, in the form in which the block gave its result.

    outputs: None for a block that returned a tensor; otherwise how long its tuple was, of which x takes the first place
    and None the others.
    """

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return x if self.outputs is None else (x, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        return "" if self.outputs is None else f"outputs={self.outputs}"
