"""Trained models, what calibrates them, and what judges them: the tasks of `benchmarks.int8_peers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks import sentences
from benchmarks.datasets import batches, cifar10, cifar10_arrays
from benchmarks.mobilenet import enlarged, mobilenet_v2
from benchmarks.models import resnet20_akamaster, resnet32_akamaster
from benchmarks.recurrent import trained
from benchmarks.separable import separable
from benchmarks.spoken_digits import spoken_digits
from gracile.data import Batch
from gracile.evaluate.quality import Values, collect

Predict = Callable[[Batch], Any]


@dataclass(frozen=True)
class Task:
    """calibration: batches of inputs. evaluate: per-example values of the metric of a predictor.

    step: what a user of gracile would write for the model.
    """

    model: nn.Module
    calibration: list[Batch]
    metric: Any
    evaluate: Callable[[Predict], Values]
    step: gc.Quantize = gc.Quantize(gc.W8A8)
    transformer: bool = False


def _labelled(model: nn.Module, calibration: Tensor, images: Tensor, labels: Tensor, size: int) -> Task:
    test = batches(images, labels, size)
    return Task(
        model,
        list(calibration.split(size)),
        gc.metrics.accuracy,
        lambda predict: collect(lambda batch: predict(batch[0]), test, gc.metrics.accuracy),
    )


def _cifar(load: Callable[[], nn.Module], seed: int) -> Task:
    """512 training images calibrate, test5k judges."""
    images, _ = cifar10("train20k")
    return _labelled(load(), images[_chosen(len(images), seed, 512)], *cifar10("test5k"), 32)


def mobilenet(seed: int) -> Task:
    """128 enlarged CIFAR training images calibrate; the share of 1,000 test images that the float net answers alike."""
    model = mobilenet_v2()
    pixels = {split: torch.from_numpy(cifar10_arrays(split)[0]).permute(0, 3, 1, 2) for split in ("train20k", "test5k")}
    chosen = pixels["train20k"][_chosen(20_000, seed, 128)]
    calibration, images = (enlarged(part.float() / 255) for part in (chosen, pixels["test5k"][:1000]))
    with torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in images.split(32)])
    return _labelled(model, calibration, images, answers, 32)


def gru(seed: int) -> Task:
    """Spoken digits: 320 training clips calibrate, all test clips judge."""
    parts, folder = spoken_digits(), Path("runs/recurrent")
    folder.mkdir(parents=True, exist_ok=True)
    model = trained("gru", parts["train"], folder, seed, epochs=25)
    frames, labels = (torch.cat(pair) for pair in zip(parts["test"], parts["further_test"], strict=True))
    calibration = parts["train"][0][_chosen(len(parts["train"][1]), seed, 320)]
    return _labelled(model, calibration, frames[:896], labels[:896], 32)


def minilm(seed: int) -> Task:
    """The STS benchmark: 512 training sentences calibrate, the test pairs judge by Spearman."""
    first, second, _ = sentences.sts("train")
    texts = [*first, *second]
    chosen = np.random.default_rng(seed).permutation(len(texts))[:512]
    calibration = sentences.tokenize([texts[i] for i in chosen], 32)
    first, second, gold = sentences.sts("test")
    test = sentences.tokenize([*first, *second], 32)

    def evaluate(predict: Predict) -> Values:
        with torch.no_grad():
            vectors = torch.cat([predict(batch) for batch in test])
        return np.stack([sentences.similarities(vectors).double().numpy(), gold], axis=1)

    step = gc.Quantize(gc.W8A8, ranges=gc.ranges.MinMax(), equalize=gc.equalize.SmoothQuant())
    return Task(sentences.minilm(), calibration, gc.metrics.Spearman(), evaluate, step, transformer=True)


def _chosen(total: int, seed: int, count: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


TASKS: dict[str, Callable[[int], Task]] = {
    "resnet20": lambda seed: _cifar(resnet20_akamaster, seed),
    "resnet32": lambda seed: _cifar(resnet32_akamaster, seed),
    "separable": lambda seed: _cifar(separable, seed),
    "mobilenet": mobilenet,
    "gru": gru,
    "minilm": minilm,
}
