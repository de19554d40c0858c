from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.layer_stats import LayerStats
from gracile.stats import collect
from gracile.stats.collect import RowSample, collect_activations, estimate_bytes, merge_stats
from gracile.stats.rows import output_rows

EVERYTHING = ("input", "output", "input_mean", "input_sq_mean", "input_abs_mean", "gram", "output_mean")
#: Products of a batch are float32 (relative rounding 6e-8 for each of up to some hundred terms).
GRAM = 2e-5


def brute_rows(layer: nn.Conv1d | nn.Conv2d, x: np.ndarray) -> np.ndarray:
    """[groups, positions, columns] by loops over every output position."""
    if x.ndim == 3:
        x = x[:, :, None, :]
    kernel, stride, padding, dilation = (
        (value if len(value) == 2 else (neutral, *value))
        for value, neutral in ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0), (layer.dilation, 1))
    )
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    size = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    width = x.shape[1] // layer.groups
    rows = []
    for g in range(layer.groups):
        part = []
        for n, i, j in itertools.product(range(x.shape[0]), range(size[0]), range(size[1])):
            taps = [
                x[n, c, i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]]
                for c in range(g * width, (g + 1) * width)
                for a in range(kernel[0])
                for b in range(kernel[1])
            ]
            part.append(taps)
        rows.append(part)
    return np.array(rows)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    nn.Conv2d(4, 8, 3, padding=1, groups=4),
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv1d(4, 4, 2, dilation=3, groups=2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_moments_and_gram_of_convolutions_equal_loops_in_numpy(layer: nn.Conv1d | nn.Conv2d) -> None:
    shape = (3, 4, 9) if isinstance(layer, nn.Conv1d) else (3, 4, 7, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stats = collect_activations(nn.Sequential(layer), ["0"], EVERYTHING, Data(calibration=[x]))["0"]
    rows = brute_rows(layer, x.double().numpy())
    expected = np.stack([2 / len(r) * r.T @ r for r in rows])
    np.testing.assert_allclose(stats.input_mean, rows.mean(1).ravel(), atol=1e-12)
    np.testing.assert_allclose(stats.input_sq_mean, (rows**2).mean(1).ravel(), rtol=1e-12)
    np.testing.assert_allclose(stats.input_abs_mean, np.abs(rows).mean(1).ravel(), rtol=1e-12)
    np.testing.assert_allclose(stats.gram, expected, atol=GRAM)
    assert stats.gram is not None and stats.gram.dtype == torch.float64
    assert stats.examples == rows.shape[1]
    # The unfolded weight times the rows is what the layer computes: the columns are in the weight's order.
    weight = layer.weight.detach().double().numpy().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    output = np.concatenate([r @ w.T for r, w in zip(rows, weight)], axis=1) + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(stats.output_mean, output.mean(0), atol=1e-5)  # the layer computes in float32


def test_moments_of_a_linear_layer_over_tokens() -> None:
    layer = nn.Linear(5, 3)
    batches = [torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    stats = collect_activations(nn.Sequential(layer), ["0"], EVERYTHING, Data(calibration=batches))["0"]
    rows = torch.cat(batches).reshape(-1, 5).double().numpy()
    np.testing.assert_allclose(stats.input_mean, rows.mean(0), atol=1e-14)
    np.testing.assert_allclose(stats.gram, (2 / 42 * rows.T @ rows)[None], atol=GRAM)
    assert stats.gram is not None and torch.equal(stats.gram, stats.gram.transpose(1, 2))
    np.testing.assert_allclose(
        stats.output_mean,
        rows.mean(0) @ layer.weight.detach().double().numpy().T + layer.bias.detach().numpy(),
        atol=1e-6,
    )
    assert stats.input is not None and (stats.input.minimum, stats.input.maximum) == (rows.min(), rows.max())
    assert stats.input.counts.sum() == rows.size
    assert stats.output is not None and stats.output.counts.sum() == 42 * 3
    assert stats.examples == 42


def test_several_batches_of_different_sizes_equal_one() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
    x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    once = collect_activations(net, ["0", "3"], EVERYTHING, Data(calibration=[x]))
    parts = collect_activations(net, ["0", "3"], EVERYTHING, Data(calibration=list(x.split([5, 1, 6]))))
    for name in ("0", "3"):
        for key in ("input_mean", "input_sq_mean", "input_abs_mean", "output_mean"):
            np.testing.assert_allclose(getattr(parts[name], key), getattr(once[name], key), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(parts[name].gram, once[name].gram, atol=GRAM)
        assert parts[name].input.counts.sum() == once[name].input.counts.sum()
        assert parts[name].input.maximum == once[name].input.maximum
        assert parts[name].examples == once[name].examples


def test_wide_layers_keep_their_gram_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "GRAM_IN_FLOAT64", 8)
    x = torch.randn(6, 9)
    stats = collect_activations(nn.Sequential(nn.Linear(9, 2)), ["0"], ["gram"], Data(calibration=[x, x]))["0"]
    assert stats.gram is not None and stats.gram.dtype == torch.float32
    np.testing.assert_allclose(stats.gram[0], 2 / 6 * x.double().T @ x.double(), atol=GRAM)


@pytest.mark.parametrize("needs", [[key] for key in EVERYTHING] + [list(EVERYTHING)], ids=str)
def test_the_estimate_is_what_the_accumulators_hold(needs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(collect._Accumulator):
        def freeze(self) -> LayerStats:
            tensors = [*self.sums.values(), *(h.counts for h in self.histograms.values())]
            held.append(sum(t.numel() * t.element_size() for t in tensors))
            return super().freeze()

    monkeypatch.setattr(collect, "_Accumulator", Watched)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 5))
    collect_activations(net, ["0", "2"], needs, Data(calibration=[torch.randn(2, 4, 6, 6)]))
    assert sum(held) == estimate_bytes(net, ["0", "2"], needs)


def test_more_than_the_memory_allowed_is_refused_before_the_pass() -> None:
    net = nn.Sequential(nn.Linear(64, 8))
    called: list[int] = []
    net.register_forward_pre_hook(lambda *_: called.append(1))
    data = Data(calibration=[torch.randn(2, 64)])
    with pytest.raises(ConfigError, match=r"more than the 0 MiB allowed[\s\S]*only\(") as caught:
        collect_activations(net, ["0"], ["gram"], data, memory_bytes=64 * 64 * 8 - 1)
    assert "\n" in str(caught.value) and not called
    assert collect_activations(net, ["0"], ["gram"], data, memory_bytes=64 * 64 * 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_the_hooks_and_modes_restored(bad: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(DataError, match="Layer '0' receives values that are not finite"):
        collect_activations(net, ["0", "2"], ["input_mean"], Data(calibration=[torch.randn(3, 4), x]))
    assert [m.training for m in net] == [False, True, True]
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_hooks_modes_and_batch_norm_are_as_before_and_dropout_is_off() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    data = Data(calibration=[torch.randn(8, 4)])
    first = collect_activations(net, ["3"], ["input_mean"], data)["3"]
    second = collect_activations(net, ["3"], ["input_mean"], data)["3"]
    assert first.input_mean is not None and torch.equal(first.input_mean, second.input_mean)
    assert [m.training for m in net] == [True, False, True, True]
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Odd(nn.Module):
    """A layer called by keyword, one called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.keyword, self.twice, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.twice(self.keyword(input=x)))
        return y


def test_layers_called_by_keyword_twice_and_never() -> None:
    net, x = Odd(), torch.randn(5, 3)
    stats = collect_activations(net, ["keyword", "twice", "never"], EVERYTHING, Data(calibration=[x]))
    assert set(stats) == {"keyword", "twice"}
    np.testing.assert_allclose(stats["keyword"].input_mean, x.double().mean(0), atol=1e-14)
    assert stats["keyword"].input is not None
    with torch.no_grad():
        y = net.keyword(x)
        both = torch.cat([y, net.twice(y)]).double()
    np.testing.assert_allclose(stats["twice"].input_mean, both.mean(0), atol=1e-14)
    assert stats["twice"].examples == 10


def test_an_embedding_has_no_input_statistics_but_an_output() -> None:
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    stats = collect_activations(net, ["0"], ("input", "output", "output_mean"), Data(calibration=[torch.arange(6)]))[
        "0"
    ]
    assert stats.input is None and stats.input_mean is None
    np.testing.assert_allclose(stats.output_mean, net[0].weight.detach().double().mean(0), atol=1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(2, 2, 3),
    ],
    ids=str,
)
def test_inputs_that_cannot_be_unfolded_are_named_and_output_means_still_work(layer: nn.Module) -> None:
    net, data = nn.Sequential(layer), Data(calibration=[torch.randn(2, 2, 5, 5)])
    with pytest.raises(ConfigError, match=type(layer).__name__):
        collect_activations(net, ["0"], ["gram"], data)
    assert not layer._forward_hooks
    mean = collect_activations(net, ["0"], ["output_mean"], data)["0"].output_mean
    with torch.no_grad():
        np.testing.assert_allclose(mean, layer(data.calibration_batches[0]).double().mean((0, 2, 3)), atol=1e-12)


def test_channels_of_an_output_without_a_batch_axis() -> None:
    y = torch.arange(12.0).reshape(3, 2, 2)
    assert output_rows(nn.Conv2d(1, 3, 1), y).shape == (4, 3)
    assert output_rows(nn.Conv2d(1, 3, 1), y).mean(0).tolist() == [1.5, 5.5, 9.5]


def test_unknown_statistics_no_batches_and_progress() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Unknown activation statistics: gradient"):
        collect_activations(net, ["0"], ["gradient"], Data(calibration=[torch.ones(1, 2)]))
    with pytest.raises(DataError, match="no batches"):
        collect_activations(net, ["0"], ["input"], Data(calibration=[]))
    seen: list[Any] = []
    data = Data(calibration=[torch.ones(1, 2)] * 3)
    collect_activations(net, ["0"], ["input"], data, on_batch=seen.append)
    assert seen == [1, 2, 3]


def test_merged_records_keep_every_field() -> None:
    a = {"x": LayerStats(input_mean=torch.ones(2), examples=4), "y": LayerStats(examples=1)}
    b = {"x": LayerStats(gradient=torch.zeros(2), examples=9)}
    merged = merge_stats(a, b)
    assert merged["x"].input_mean is not None and merged["x"].gradient is not None
    assert merged["x"].examples == 9 and merged["y"].examples == 1


def test_peaks_and_rows_of_linear_inputs() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(3, 3, 1))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(40, 3, 5, generator=generator) for _ in range(7)]
    stats = collect_activations(net, ["0", "1"], {"input_peak", "input_rows"}, Data(calibration=data))
    rows = torch.cat(data).reshape(-1, 5)
    assert torch.equal(stats["0"].input_peak, rows.abs().amax(0))
    sample = stats["0"].input_rows
    assert RowSample.SIZE <= len(sample) <= 2 * RowSample.SIZE
    assert all(bool((rows == row).all(1).any()) for row in sample)
    thirds = [int((sample[:, None] == torch.cat(data[i : i + 2]).reshape(-1, 5)).all(2).any(1).sum()) for i in (0, 5)]
    assert min(thirds) > 0.15 * len(sample)  # two of seven batches, early or late, are 29 % of the stream
    assert stats["1"].input_peak is None and stats["1"].input_rows is None


def test_a_sample_of_a_short_stream_is_all_of_it() -> None:
    sample = RowSample()
    parts = [torch.randn(10, 2), torch.randn(3, 2)]
    for part in parts:
        sample.add(part)
    assert torch.equal(torch.cat(sample.kept), torch.cat(parts))


def test_divisors_are_taken_out_before_looking() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    data, divisor = [torch.tensor([[2.0, -8.0], [1.0, 4.0]])], torch.tensor([2.0, 4.0])
    stats = collect_activations(net, ["0"], {"input"}, Data(calibration=data), divisors={"0": divisor})
    assert (stats["0"].input.minimum, stats["0"].input.maximum) == (-2.0, 1.0)


def test_few_rows_of_a_batch_stand_for_all_of_it() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    images = [torch.randn(16, 3, 12, 12) for _ in range(4)]
    needs, data = {"gram", "input_mean"}, Data(calibration=images)
    net = nn.Sequential(layer)
    whole = collect_activations(net, ["0"], needs, data)["0"]
    part = collect_activations(net, ["0"], needs, data, rows_per_batch=1000)["0"]
    same = collect_activations(net, ["0"], needs, data, rows_per_batch=16 * 144)["0"]
    assert whole.gram is not None and part.gram is not None and same.gram is not None
    assert torch.equal(same.gram, whole.gram)
    assert part.examples == 4000
    difference = float((part.gram - whole.gram).norm() / whole.gram.norm())
    assert 0 < difference < 0.2  # 4,000 independent rows of 27 columns: about sqrt(27 / 4000)
