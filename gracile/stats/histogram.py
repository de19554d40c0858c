"""A histogram of a stream of tensors whose range is not known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.layer_stats import Histogram

#: Values binned at a time, which bounds the temporary memory to a few megabytes.
CHUNK = 1 << 20

#: Below this, bins / width would overflow float32.
SMALLEST_WIDTH = 1e-30


class StreamingHistogram:
    """Counts of all values seen, in equal bins over a range that doubles as values arrive outside it.

    The first values that differ set the range. When a later one lies outside, neighbouring bins merge in pairs and the
    range doubles towards it, so no count is ever lost or moved to a bin that does not contain its value. The exact
    minimum and maximum are kept beside the bins, and those of every tensor that came. Memory: `bins` integers, and two
    numbers for each tensor.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins={bins}: an even number is needed, since bins merge in pairs.")
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.low = self.high = 0.0
        self.minimum, self.maximum = float("inf"), -float("inf")
        self.extremes: list[tuple[float, float]] = []
        self._constant = 0  # values seen while all were equal, which no range can hold yet

    def update(self, tensor: Tensor) -> None:
        """Add all values of a tensor of any shape, dtype and device; NaN and infinities raise DataError."""
        values = tensor.detach().reshape(-1)
        if values.numel() == 0:
            return
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        low, high = (float(extreme) for extreme in values.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN compares false
            raise DataError(
                "A layer's values are NaN or infinite on the calibration data.\n"
                "  Check the data (it is fed to the model as it is) and that the model works on it."
            )
        self.extremes.append((low, high))
        before = self.minimum
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if self.minimum == self.maximum:
            self._constant += values.numel()
            return
        if self.low == self.high:
            self.low, self.high = self.minimum, max(self.maximum, self.minimum + SMALLEST_WIDTH)
            if self._constant:
                self.counts += self._binned(torch.full((1,), before, dtype=torch.float64)) * self._constant
        self._widen()
        for chunk in values.split(CHUNK):
            self.counts += self._binned(chunk)

    def freeze(self) -> Histogram:
        """The histogram so far. Of a constant c, the range is that from 0 to c; of zeros, [0, 1]."""
        if self.minimum > self.maximum:
            raise DataError("A layer saw no values on the calibration data, so it has no range.")
        if self.minimum < self.maximum:
            extremes = tuple(self.extremes)
            return Histogram(self.counts.double(), self.low, self.high, self.minimum, self.maximum, extremes)
        constant = self.minimum
        low, high = (min(constant, 0.0), max(constant, 0.0)) if constant else (0.0, 1.0)
        counts = torch.zeros(self.bins, dtype=torch.float64)
        counts[-1 if constant > 0 else 0] = self._constant
        return Histogram(counts, low, high, constant, constant, tuple(self.extremes))

    def _binned(self, values: Tensor) -> Tensor:
        positions = (values - self.low) * (self.bins / (self.high - self.low))
        # int32 is four times faster to count than int64, and the clamp takes in what rounding put beyond an end.
        return torch.bincount(positions.clamp_(0, self.bins - 1).to(torch.int32), minlength=self.bins).cpu()

    def _widen(self) -> None:
        half = self.bins // 2
        while self.minimum < self.low or self.maximum > self.high:
            width = self.high - self.low
            merged = self.counts.reshape(half, 2).sum(dim=1)
            self.counts = torch.zeros_like(self.counts)
            if self.minimum < self.low:
                self.low -= width
                self.counts[half:] = merged
            else:
                self.high += width
                self.counts[:half] = merged
