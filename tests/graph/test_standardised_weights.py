"""Convolutions whose weight is standardised in the forward, by a batch norm over the weight's rows."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.graph import check_cut, plan_resize, trace
from gracile.surgery import apply


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


def test_outputs_are_cut_exactly_where_a_plain_layer_reads_them_and_inputs_are_known_to_be_inexact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1))
    x = torch.randn(2, 3, 9, 9)
    found = trace(model, lambda m: m(x))
    free = {g.name: (g.units, g.exact) for g in found.groups if g.frozen is None}
    assert free == {"0": (8, "a weight is standardised over it"), "2": (12, None)}
    for keep, exact in (({"2": [0, 2, 5, 7, 8]}, True), ({"0": [1, 2, 6]}, False)):
        cut = copy.deepcopy(model)
        apply(cut, [plan_resize(found, keep)])
        check = check_cut(model, cut, found, keep, lambda m: m(x))
        assert (check.ran, check.exact, check.finite) == (True, exact, True)
    assert cut[0].out_channels == 3
