"""One streaming pass over calibration data that collects the union of the statistics several consumers need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data
from gracile.errors import ConfigError, DataError
from gracile.layer_stats import ACTIVATION_STATS, LayerStats
from gracile.modes import eval_mode
from gracile.stats.histogram import StreamingHistogram
from gracile.stats.rows import CONVOLUTIONS, count_rows, input_rows, output_rows, unfold_input, unfoldable

GRAM_IN_FLOAT64 = 1024  # up to this width sums are kept in float64; beyond, float32 halves the memory


def collect_activations(
    model: nn.Module,
    layers: Collection[str],
    needs: Collection[str],
    data: Data,
    *,
    divisors: Mapping[str, Tensor] | None = None,
    memory_bytes: int | None = None,
    rows_per_batch: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, LayerStats]:
    """Statistics of the named layers' inputs and outputs over `data.calibration_batches`, by layer name.

    needs: fields of LayerStats out of ACTIVATION_STATS. The model runs in eval mode without gradients; its mode and
    hooks are as before afterwards. A layer that is never called has no entry.
    divisors: layer -> [in]; what its inputs are divided by before they are looked at. None: nothing is.
    rows_per_batch: of a layer that is no grouped convolution, at most so many tokens or positions of a batch, drawn at
    random, stand behind its moments; neighbouring positions of an image say nearly the same. None: all.
    memory_bytes: what the accumulators may take together; None: no bound. Raises ConfigError before the pass if they
    would take more, DataError for no batches or for inputs that are not finite.
    """
    unknown = set(needs) - ACTIVATION_STATS
    if unknown:
        raise ConfigError(f"Unknown activation statistics: {', '.join(sorted(unknown))}.")
    estimate = estimate_bytes(model, layers, needs)
    if memory_bytes is not None and estimate > memory_bytes:
        raise ConfigError(
            f"The statistics need {estimate / 2**20:.0f} MiB for {len(layers)} layers, more than the "
            f"{memory_bytes / 2**20:.0f} MiB allowed.\n  Work on fewer layers at a time with only(...)."
        )
    accumulators = {
        name: _Accumulator(
            name, model.get_submodule(name), frozenset(needs), (divisors or {}).get(name), rows_per_batch
        )
        for name in layers
    }
    handles = [
        model.get_submodule(name).register_forward_hook(acc.hook, with_kwargs=True)
        for name, acc in accumulators.items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            count = 0
            for batch in data.calibration_batches:
                data.forward(model, batch)
                count += 1
                if on_batch is not None:
                    on_batch(count)
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise DataError("The calibration data hold no batches.")
    return {name: acc.freeze() for name, acc in accumulators.items() if acc.calls}


def estimate_bytes(model: nn.Module, layers: Iterable[str], needs: Collection[str]) -> int:
    """Bytes that the accumulators of `collect_activations` will take."""
    total = 0
    for name in layers:
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        columns = _columns(module, weight) if isinstance(weight, Tensor) else 0
        groups = getattr(module, "groups", 1) if isinstance(module, CONVOLUTIONS) else 1
        if isinstance(module, nn.Linear):
            total += 4 * columns * (("input_peak" in needs) + 2 * RowSample.SIZE * ("input_rows" in needs))
        total += 2048 * 8 * (("input" in needs) + ("output" in needs))
        total += 8 * columns * groups * len({"input_mean", "input_sq_mean", "input_abs_mean"} & set(needs))
        if "gram" in needs:
            total += groups * columns * columns * (8 if columns <= GRAM_IN_FLOAT64 else 4)
        if "output_mean" in needs and isinstance(weight, Tensor):
            total += 8 * _outputs(module, weight)
    return total


def _columns(module: nn.Module, weight: Tensor) -> int:
    """In-features of one group of the unfolded weight."""
    return weight[0].numel() if weight.ndim > 1 else 1


def _outputs(module: nn.Module, weight: Tensor) -> int:
    """Channels of the output."""
    if isinstance(module, nn.Embedding):
        return weight.shape[1]
    return int(module.out_channels) if isinstance(module, CONVOLUTIONS) else weight.shape[0]


class _Accumulator:
    """Running sums of one layer; the forward hook feeds it."""

    def __init__(
        self, name: str, module: nn.Module, needs: frozenset[str], divisor: Tensor | None, drawn: int | None
    ) -> None:
        self.name, self.module, self.needs, self.divisor, self.drawn = name, module, needs, divisor, drawn
        self.generator = torch.Generator().manual_seed(0)
        if not isinstance(module, nn.Linear):
            self.needs -= {"input_peak", "input_rows"}
        self.rows = RowSample()
        self.peak: Tensor | None = None
        self.calls = 0
        self.count = 0  # tokens or positions behind the sums
        self.sums: dict[str, Tensor] = {}
        self.output_count = 0
        self.histograms = {side: StreamingHistogram() for side in ("input", "output") if side in needs}

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        y = output if isinstance(output, Tensor) else None
        self.calls += 1
        if x is not None and x.is_floating_point():
            if not torch.isfinite(x).all():
                raise DataError(
                    f"Layer '{self.name}' receives values that are not finite (NaN or infinity).\n"
                    f"  Check the calibration data and the model for them."
                )
            if self.divisor is not None:
                x = x / self.divisor.to(x)
            if "input" in self.histograms:
                self.histograms["input"].update(x)
            if "input_peak" in self.needs:
                peak = x.detach().reshape(-1, x.shape[-1]).float().abs().amax(0)
                self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
            if "input_rows" in self.needs:
                self.rows.add(x.detach().reshape(-1, x.shape[-1]))
            if self.needs & {"input_mean", "input_sq_mean", "input_abs_mean", "gram"}:
                self._add_moments(self._rows(x))
        if y is not None and y.is_floating_point():
            if "output" in self.histograms:
                self.histograms["output"].update(y)
            if "output_mean" in self.needs:
                rows = output_rows(self.module, y)
                self._add("output_mean", rows.double().sum(0))
                self.output_count += rows.shape[0]

    def _rows(self, x: Tensor) -> Tensor:
        """[groups, tokens, columns], of all or of those drawn."""
        if self.drawn is None or getattr(self.module, "groups", 1) > 1 or not unfoldable(self.module):
            return unfold_input(self.module, x)
        count = count_rows(self.module, x)
        if count <= self.drawn:
            return unfold_input(self.module, x)
        chosen = torch.randint(count, (self.drawn,), generator=self.generator).to(x.device)
        return input_rows(self.module, x, chosen).unsqueeze(0)

    def _add_moments(self, rows: Tensor) -> None:
        """rows: [groups, tokens, columns]."""
        self.count += rows.shape[1]
        if "input_mean" in self.needs:
            self._add("input_mean", rows.double().sum(1).flatten())
        if "input_sq_mean" in self.needs:
            self._add("input_sq_mean", rows.double().square().sum(1).flatten())
        if "input_abs_mean" in self.needs:
            self._add("input_abs_mean", rows.double().abs().sum(1).flatten())
        if "gram" in self.needs:
            wide = rows.shape[2] > GRAM_IN_FLOAT64
            product = torch.bmm(rows.transpose(1, 2).float(), rows.float())
            self._add("gram", product if wide else product.double())

    def _add(self, key: str, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value.clone()

    def freeze(self) -> LayerStats:
        fields: dict[str, Any] = {side: h.freeze() for side, h in self.histograms.items() if h.minimum <= h.maximum}
        for key, total in self.sums.items():
            if key == "output_mean":
                fields[key] = total / self.output_count
            else:
                fields[key] = total * ((2.0 if key == "gram" else 1.0) / self.count)
        if self.peak is not None:
            fields["input_peak"] = self.peak
        if self.rows.kept:
            fields["input_rows"] = torch.cat(self.rows.kept)
        if "gram" in fields:
            fields["gram"] = (fields["gram"] + fields["gram"].transpose(1, 2)) / 2
        return LayerStats(**fields, examples=self.count or self.output_count)


class RowSample:
    """Between `SIZE` and twice as many rows of a stream, evenly spread over it (all of a stream that has fewer)."""

    SIZE = 256

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self._quota = self.SIZE  # rows that a batch gives; halved whenever half of what is kept goes

    def add(self, rows: Tensor) -> None:
        """Rows [n, d] of one batch."""
        chosen = torch.linspace(0, len(rows) - 1, min(self._quota, len(rows))).round().long()
        self.kept.append(rows[chosen.to(rows.device)].float().clone())
        if sum(len(part) for part in self.kept) > 2 * self.SIZE:
            self.kept = [torch.cat(self.kept)[::2]]
            self._quota = max(1, self._quota // 2)


def merge_stats(*parts: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """Statistics of the same layers from several passes in one record each; later parts win where both have a field."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, stats in part.items():
            fields = {k: v for k, v in vars(stats).items() if v is not None}
            merged.setdefault(name, {}).update(fields)
    return {name: LayerStats(**fields) for name, fields in merged.items()}


def first_batch(data: Data) -> Batch:
    """The first calibration batch; raises DataError where there is none."""
    for batch in data.calibration_batches:
        return batch
    raise DataError("The calibration data hold no batches.")
