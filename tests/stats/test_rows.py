"""Rows at chosen positions against the whole input unfolded by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.stats.rows import count_rows, input_rows, rows_at


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """[tokens or positions, columns] of all of the input."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    if isinstance(layer, nn.Conv1d):
        padded = F.pad(x, (layer.padding[0],) * 2)
        starts = range(0, padded.shape[-1] - layer.dilation[0] * (layer.kernel_size[0] - 1), layer.stride[0])
        taps = [torch.stack([padded[..., s + k * layer.dilation[0]] for s in starts], 1) for k in range(3)]
        return torch.stack(taps, -1).flatten(2).flatten(0, 1)
    assert isinstance(layer, nn.Conv2d)
    sizes = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    return F.unfold(x, layer.kernel_size, **sizes).transpose(1, 2).flatten(0, 1)


CASES = [
    (nn.Linear(5, 3), (4, 6, 5)),
    (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 6)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 3, 9, 8)),
    (nn.Conv2d(3, 4, 1), (2, 3, 5, 5)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 11)),
]


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda value: str(value)[:60])
def test_chosen_rows_are_those_of_the_unfolded_input(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    whole = unfolded(layer, x)
    assert count_rows(layer, x) == len(whole)
    chosen = torch.randint(len(whole), (40,))
    assert torch.equal(input_rows(layer, x, chosen), whole[chosen])


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda value: str(value)[:60])
def test_the_weight_on_input_rows_gives_the_output_rows(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    chosen = torch.randint(count_rows(layer, x), (40,))
    given = input_rows(layer, x, chosen) @ layer.weight.flatten(1).T + layer.bias
    # The same float32 sums in another order
    torch.testing.assert_close(given, rows_at(layer, layer(x), chosen), atol=1e-5, rtol=1e-5)
