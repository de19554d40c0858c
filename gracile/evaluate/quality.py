"""Quality: a metric on every example, its value with an interval, and whether a drop stays within a limit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gracile.data import Batch, batch_size, first_line
from gracile.errors import DataError, GracileError

Values = npt.NDArray[np.float64]
Metric = Callable[[Any, Batch], Any]
Statistic = Callable[[npt.NDArray[np.intp]], float]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A metric's value on `examples` examples, and the interval [low, high] in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float
    examples: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Quality of two models on the same examples.

    drop: before - after, in the unit of the metric; positive is worse.
    low, high: two-sided confidence interval of the drop.
    upper_bound: the drop is at most this with the given confidence (one-sided); inf where resampling cannot
        tell.
    non_inferior: upper_bound <= max_drop.
    verdict: the same in one line for a person.
    """

    before: float
    after: float
    drop: float
    low: float
    high: float
    upper_bound: float
    max_drop: float
    confidence: float
    examples: int
    non_inferior: bool
    verdict: str


def collect(predict: Callable[[Batch], Any], batches: Iterable[Batch], metric: Metric) -> Values:
    """metric(predict(batch), batch) for every example of every batch: float64 [n] or [n, k].

    `predict` gives the outputs for a batch: a model, or a model exported to a runtime. Raises DataError, naming the
    batch, where the metric gives something that is not one finite row for each example.
    """
    parts: list[Values] = []
    with torch.no_grad():
        for index, batch in enumerate(batches):
            part = _checked(_scored(metric, predict(batch), batch, index), batch, index, metric_name(metric))
            if parts and part.shape[1:] != parts[0].shape[1:]:
                raise DataError(
                    f"The metric '{metric_name(metric)}' gave {_row(part)} per example on batch {index}, "
                    f"and {_row(parts[0])} before.\n  It must give the same number for every batch."
                )
            parts.append(part)
    if not parts:
        raise DataError("The evaluation data hold no batches.\n  Pass Data(evaluation=...) with labelled batches.")
    return np.concatenate(parts)


def aggregate(metric: Metric, values: Values) -> float:
    """The metric over all examples: its own `aggregate(values)` where it has one, else the mean of the values."""
    own = getattr(metric, "aggregate", None)
    if own is None:
        return float(np.mean(values))
    try:
        return float(own(values))
    except GracileError:
        raise
    except Exception as error:  # whatever the user's metric raises
        raise DataError(
            f"The metric '{metric_name(metric)}' fails in aggregate(values): {first_line(error)}\n"
            f"  It is called with the values of all examples, {values.shape}, and returns one number."
        ) from error


def quality(
    metric: Metric, values: Values, *, confidence: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Quality:
    """The metric over all examples with its confidence interval.

    The interval is the percentile bootstrap over examples; for a mean of zeros and ones it is Wilson's (1927), which
    does not collapse to a point where every example is right.
    """
    value = _finite(aggregate(metric, values), metric)
    if _is_rate(metric, values):
        from scipy.stats import binomtest

        interval = binomtest(int(values.sum()), values.size).proportion_ci(confidence, method="wilson")
        low, high = float(interval.low), float(interval.high)
    else:
        spread = _bootstrap(_statistic(metric, values), len(values), seed, resamples)
        low, high = _interval(spread, confidence)
    return Quality(value=value, low=low, high=high, examples=len(values), name=metric_name(metric))


def compare(
    metric: Metric,
    before_values: Values,
    after_values: Values,
    *,
    max_drop: float,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Comparison:
    """Whether aggregate(before) - aggregate(after) is at most `max_drop`, with confidence: a non-inferiority test.

    before_values, after_values: per-example values of the two models on the same examples, in the same order.
    max_drop: the limit, in the unit of the metric; infinity where there is none.

    Examples are resampled with replacement, the same for both (paired percentile bootstrap, Efron & Tibshirani 1993,
    ch. 13); a resample on which the metric is undefined counts as an unlimited drop. For a mean of zeros and ones the
    bound is at least that of Agresti & Min (2005), which adds half an example to each cell of the 2 x 2 table: with no
    flip seen on few examples the bootstrap alone would claim a drop of exactly zero.
    """
    if before_values.shape != after_values.shape:
        raise DataError(
            f"The two models were judged on different examples: values of shape {before_values.shape} and "
            f"{after_values.shape}.\n  Collect both from the same batches, in the same order."
        )
    before, after = (_finite(aggregate(metric, v), metric) for v in (before_values, after_values))
    own = getattr(metric, "aggregate", None)
    if own is None:
        statistic = _statistic(metric, before_values - after_values)
    else:
        first, second = _statistic(metric, before_values), _statistic(metric, after_values)

        def statistic(index: npt.NDArray[np.intp]) -> float:
            return first(index) - second(index)

    spread = _bootstrap(statistic, len(before_values), seed, resamples)
    low, high = _interval(spread, confidence)
    upper = _upper(spread, confidence)
    if _is_rate(metric, before_values) and _is_rate(metric, after_values):
        upper = max(upper, _agresti_min(before_values, after_values, confidence))
        high = max(high, upper)
    drop = before - after
    return Comparison(
        before=before,
        after=after,
        drop=drop,
        low=low,
        high=high,
        upper_bound=upper,
        max_drop=max_drop,
        confidence=confidence,
        examples=len(before_values),
        non_inferior=upper <= max_drop,
        verdict=_verdict(
            drop, upper, max_drop, confidence, in_points=0 <= min(before, after) <= max(before, after) <= 1
        ),
    )


def metric_name(metric: Metric) -> str:
    """The metric's `name` where it has one, else the name of the function or class."""
    for name in (getattr(metric, "name", None), getattr(metric, "__name__", None)):
        if isinstance(name, str):
            return name
    return type(metric).__name__


def _scored(metric: Metric, outputs: Any, batch: Batch, index: int) -> Any:
    try:
        return metric(outputs, batch)
    except GracileError:
        raise
    except Exception as error:  # whatever the user's metric raises
        raise DataError(
            f"The metric '{metric_name(metric)}' fails on batch {index}: {first_line(error)}\n"
            f"  It is called as metric(outputs, batch) and returns one value for each example."
        ) from error


def _checked(raw: Any, batch: Batch, index: int, name: str) -> Values:
    try:
        values = np.asarray(raw.detach().cpu() if isinstance(raw, Tensor) else raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The metric '{name}' gave {type(raw).__name__} on batch {index}, which is no array of numbers.\n"
            f"  Return a tensor or array with one row for each example."
        ) from error
    if values.ndim not in (1, 2):
        raise DataError(
            f"The metric '{name}' gave values of shape {values.shape} on batch {index}.\n"
            f"  Return one value for each example, [n] or [n, k], not their mean: intervals need the examples."
        )
    try:
        size = batch_size(batch)
    except DataError:  # a batch of strings, fed through Data(feed=...): its size is not ours to know
        size = len(values)
    if len(values) != size or size == 0:
        raise DataError(
            f"The metric '{name}' gave {len(values)} values on batch {index}, which holds {size} examples.\n"
            f"  Return one value for each example."
        )
    if not np.isfinite(values).all():
        example = int(np.argwhere(~np.isfinite(values))[0][0])
        raise DataError(
            f"The metric '{name}' gave {values[example]} for example {example} of batch {index}.\n"
            f"  Look for NaN in the outputs of the model and in the labels of that batch."
        )
    return values


def _statistic(metric: Metric, values: Values) -> Statistic:
    own = getattr(metric, "aggregate", None)
    if own is not None:
        return lambda index: float(own(values[index]))
    rows = values if values.ndim == 1 else values.mean(axis=1)
    return lambda index: float(rows[index].mean())


def _bootstrap(statistic: Statistic, examples: int, seed: int, resamples: int) -> Values:
    """The statistic on `resamples` draws of example indices; NaN where a draw leaves it undefined."""
    if examples == 1:
        return np.full(resamples, np.nan)  # one example says nothing of the spread
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "undefined metric", once for each of many draws, and it is accounted for
        draws = [statistic(generator.integers(0, examples, examples)) for _ in range(resamples)]
    return np.asarray(draws, dtype=np.float64)


def _interval(spread: Values, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    return -_upper(-spread, 1 - tail), _upper(spread, 1 - tail)


def _upper(spread: Values, confidence: float) -> float:
    """The order statistic at or above the quantile; an undefined draw counts as infinite."""
    return float(np.quantile(np.where(np.isnan(spread), np.inf, spread), confidence, method="higher"))


def _is_rate(metric: Metric, values: Values) -> bool:
    return getattr(metric, "aggregate", None) is None and values.ndim == 1 and bool(np.isin(values, (0.0, 1.0)).all())


def _agresti_min(before: Values, after: Values, confidence: float) -> float:
    """One-sided upper bound of P(before) - P(after) from matched pairs, Wald's with 1/2 added to each of four cells."""
    from scipy.stats import norm

    size = len(before) + 2.0
    lost, won = float((before > after).sum()) + 0.5, float((before < after).sum()) + 0.5
    difference = (lost - won) / size
    variance = max((lost + won) / size - difference**2, 0.0) / size
    return float(difference + norm.ppf(confidence) * variance**0.5)


def _finite(value: float, metric: Metric) -> float:
    if not np.isfinite(value):
        raise DataError(
            f"The metric '{metric_name(metric)}' is {value} over all examples.\n"
            f"  Evaluate on more data, or look at its aggregate(values)."
        )
    return value


def _row(values: Values) -> str:
    return "1 value" if values.ndim == 1 else f"{values.shape[1]} values"


def _verdict(drop: float, upper: float, limit: float, confidence: float, *, in_points: bool) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.3g} pt" if in_points else f"{value:.3g}"

    if limit == float("inf"):
        ending = ""
    elif upper <= limit:
        ending = f": within the limit of {show(limit)}"
    elif drop > limit:
        ending = f": over the limit of {show(limit)}"
    else:
        ending = f": not shown to be within the limit of {show(limit)}; more evaluation examples would narrow this"
    certain = f"with {100 * confidence:g} % confidence"
    if not np.isfinite(upper):
        bound = "bound unknown, since resampling leaves the metric undefined too often"
    elif upper < 0:
        bound = f"at least {show(-upper)} {certain}"
    else:
        bound = f"{'at most' if drop >= 0 else 'a drop of at most'} {show(upper)} {certain}"
    return f"{'drop' if drop >= 0 else 'gain'} {show(abs(drop))}, {bound}{ending}"
