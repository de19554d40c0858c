from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.context import Context
from gracile.errors import ConfigError
from gracile.graph import trace
from gracile.steps.latency.cache import LatencyCache
from gracile.steps.latency.table import LatencyTable, measure_latency_table, signature_of


def test_between_two_widths_the_share_is_linear_and_beyond_the_last_it_stays() -> None:
    table = LatencyTable({"g": {8: 0.1, 16: 0.3}})
    assert [table.share("g", n) for n in (0, 4, 8, 12, 16, 20)] == pytest.approx([0, 0.05, 0.1, 0.2, 0.3, 0.3])
    assert table.share("unknown", 4) == 0.0


def chain(*widths: int, kernel: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 3)).eval()


def signatures(model: nn.Module, size: int = 4) -> list[str]:
    traced = trace(model, lambda net: net(torch.zeros(1, 3, size, size)))
    return [signature_of(model, traced, group) for group in traced.groups if group.frozen is None]


def test_signatures_are_equal_for_equal_work_whatever_the_names() -> None:
    found = signatures(chain(3, 8, 8, 8, 8))
    assert len(found) == 4
    assert found[1] == found[2], "between equal layers"
    assert len({found[0], found[1], found[3]}) == 3, "the first has another maker, the last another reader"


def test_signatures_differ_with_sizes_and_settings() -> None:
    strided = chain(3, 8, 8, 8)
    dilated = chain(3, 8, 8, 8)
    dilated[2] = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    found = [signatures(net)[0] for net in (strided, dilated, chain(3, 8, 8, 8, kernel=1))]
    assert len(set(found)) == 3


class MeasuredTimer:
    """Times by the work of the model: one unit for each multiply-accumulate, on top of a fixed part."""

    target, whole_ms = gc.PyTorch(), 1.0

    def __init__(self, whole: int) -> None:
        self.whole = whole

    def relative(self, model: Any, seconds: float) -> float:
        return (100 + trace(model, lambda net: net(torch.zeros(1, 3, 4, 4))).macs) / (100 + self.whole)


def measured(model: nn.Module) -> tuple[LatencyTable, int]:
    """The table of two and four units less in each group, and the latency of the whole model."""
    traced = trace(model, lambda net: net(torch.zeros(1, 3, 4, 4)))
    groups = [group for group in traced.groups if group.frozen is None]
    counts = {group.name: [2, 4] for group in groups}
    data = gc.Data(calibration=[torch.zeros(1, 3, 4, 4)])
    cache, timer = LatencyCache({"test": 1}), MeasuredTimer(traced.macs)
    table = measure_latency_table(model, traced, groups, counts, timer, cache, Context(data, model, model))  # type: ignore[arg-type]
    return table, 100 + traced.macs


def test_groups_that_share_a_layer_are_each_given_what_they_save_alone() -> None:
    """Cut together, two neighbours save less than the sum; each alone saves what its own multiply-accumulates say."""
    table, whole = measured(chain(3, 8, 8, 8, 8))
    per_pixel = 16 * 9
    for removed in (2, 4):
        # By hand: the layer that makes a unit, and the one that reads it, which for the last is linear.
        assert table.share("0", removed) == pytest.approx(removed * per_pixel * (3 + 8) / whole)
        assert table.share("2", removed) == pytest.approx(removed * per_pixel * (8 + 8) / whole)
        assert table.share("4", removed) == pytest.approx(removed * per_pixel * (8 + 8) / whole)
        assert table.share("6", removed) == pytest.approx(removed * (per_pixel * 8 + 16 * 3) / whole)
    assert table.timed == 6, "two widths of three kinds of groups"


def test_groups_that_cannot_be_cut_together_are_not_timed_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gracile.steps.latency import table as module

    def cut_copy(model: nn.Module, traced: Any, keep: Any) -> nn.Module:
        if keep.keys() >= {"2", "4"} and len(keep["2"]) < 6:
            raise ConfigError("These groups cannot be cut together: sizes would no longer fit.\n  Cut them one by one.")
        return original(model, traced, keep)

    original = module.cut_copy
    monkeypatch.setattr(module, "cut_copy", cut_copy)
    table, _ = measured(chain(3, 8, 8, 8, 8))
    assert {name: sorted(row) for name, row in table.saved.items()} == {"0": [2, 4], "2": [2], "4": [2], "6": [2, 4]}
    assert table.failed == ("2 without 4 units: These groups cannot be cut together: sizes would no longer fit.",)
    assert table.timed == 5
