"""What users get wrong: each mistake is one GracileError of a few lines that says what, where and how to mend it.

Every call works in place, so that whatever happened before the error would show: weights, training flags, gradients
and hooks of the model must be as they were.
"""

from __future__ import annotations

import builtins
import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.steps import SGD, AdamW


class Net(nn.Module):
    """A small net with everything in it that a step could leave changed: a batch norm, dropout, a layer in eval."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))))


class Unpicklable(Net):
    """A net that holds a result of its own computation, which PyTorch cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = self.head.weight * 2


class Env:
    """A model and data that are right, to be spoilt in one point."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.folder, self.monkeypatch = folder, monkeypatch
        self.model = Net().train()
        self.model.norm.eval()  # a user's own choice, to be kept
        self.model.head.bias.requires_grad_(False)
        self.batch = (torch.randn(6, 3, 5, 5), torch.randint(0, 4, (6,)))
        self.batches = [self.batch, (torch.randn(6, 3, 5, 5), torch.randint(0, 4, (6,)))]
        self.data = gc.Data(
            calibration=self.batches,
            train=self.batches,
            evaluation=self.batches,
            metric=gc.metrics.accuracy,
            loss=gc.losses.cross_entropy,
        )

    def compress(self, step: Any = None, data: Any = None, model: Any = None, **settings: Any) -> Any:
        step = gc.Prune(0.3) if step is None else step
        data = self.data if data is None else data
        return gc.compress(self.model if model is None else model, step, data, inplace=True, **settings)

    def optimize(self, goal: Any = None, data: Any = None, **settings: Any) -> Any:
        goal = gc.Goal(target=gc.PyTorch()) if goal is None else goal
        return gc.optimize(self.model, self.data if data is None else data, goal, inplace=True, **settings)

    def with_data(self, **changes: Any) -> Any:
        return self.compress(data=replace(self.data, **changes))

    def saved(self) -> Path:
        return gc.compress(self.model, gc.Prune(0.3), self.data).save(self.folder / "saved")

    def without(self, *packages: str) -> None:
        """Make these packages absent."""
        real = builtins.__import__

        def absent(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] in packages:
                raise ImportError(f"No module named '{name}'")
            return real(name, *args, **kwargs)

        self.monkeypatch.setattr(builtins, "__import__", absent)


@dataclass(frozen=True)
class Mistake:
    """A call, the error it must raise, and words that its message must hold: what, where, and what to do instead."""

    name: str
    call: Callable[[Env], Any]
    error: type[gc.GracileError]
    words: tuple[str, ...]


def raises(*_: Any) -> Any:
    raise KeyError("speed")


def with_nan(env: Env) -> list[Any]:
    images, labels = env.batch
    return [(images.clone().fill_(math.nan), labels)]


def nan_model(env: Env) -> nn.Module:
    model = copy.deepcopy(env.model)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    return model


def meta_model() -> nn.Module:
    with torch.device("meta"):
        return Net()


def wide(count: int) -> list[Any]:
    return [(torch.randn(6, count, 5, 5), torch.randint(0, 4, (6,)))]


def later(env: Env, batch: Any) -> list[Any]:
    """Batches of which only the second is wrong."""
    return [env.batch, batch]


class BrokenAggregate:
    """A metric whose values are right and whose aggregate fails."""

    def __call__(self, outputs: Any, batch: Any) -> Any:
        return gc.metrics.accuracy(outputs, batch)

    def aggregate(self, values: Any) -> float:
        raise ZeroDivisionError("float division by zero")


class BrokenLoader:
    """Data whose reading fails, as where a file is missing."""

    def __iter__(self) -> Iterator[Any]:
        raise FileNotFoundError(2, "No such file or directory", "images/0.png")


DATA = [
    Mistake("one batch as data", lambda e: e.with_data(train=e.batch[0]), gc.DataError, ("train", "list of batches")),
    Mistake("a generator as data", lambda e: e.with_data(train=(b for b in e.batches)), gc.DataError, ("one-shot",)),
    Mistake("a dict as data", lambda e: e.with_data(calibration={"x": e.batch[0]}), gc.DataError, ("[batch]",)),
    Mistake("a number as data", lambda e: e.with_data(calibration=3), gc.DataError, ("calibration", "int", "iterable")),
    Mistake("batches instead of Data", lambda e: e.compress(data=e.batches), gc.DataError, ("list", "gracile.Data(")),
    Mistake("no batches", lambda e: e.with_data(train=[]), gc.DataError, ("train", "no batches", "DataLoader")),
    Mistake(
        "an empty batch",
        lambda e: e.with_data(calibration=[e.batch[0][:0]]),
        gc.DataError,
        ("calibration", "empty", "(0, 3, 5, 5)", "Drop"),
    ),
    Mistake("NaN in the data", lambda e: e.with_data(calibration=with_nan(e)), gc.DataError, ("NaN", "Clean")),
    Mistake(
        "NaN in a later batch",
        lambda e: e.compress(gc.Quantize(gc.W8A8), replace(e.data, calibration=later(e, with_nan(e)[0]))),
        gc.DataError,
        ("NaN", "alibration"),
    ),
    Mistake(
        "images of another shape", lambda e: e.with_data(evaluation=wide(2)), gc.DataError, ("evaluation", "feed", "2")
    ),
    Mistake(
        "a later batch of another shape",
        lambda e: e.compress(gc.Quantize(gc.W8A8), replace(e.data, calibration=later(e, wide(2)[0]))),
        gc.DataError,
        ("does not run", "(6, 2, 5, 5)", "feed"),
    ),
    Mistake("a string as batch", lambda e: e.with_data(calibration=["cat"]), gc.DataError, ("str", "feed")),
    Mistake("an unknown key", lambda e: e.with_data(calibration=[{"x": e.batch[0]}]), gc.DataError, ("'x'", "images")),
    Mistake("evaluation without labels", lambda e: e.with_data(evaluation=[e.batch[0]]), gc.DataError, ("label",)),
    Mistake("training without labels", lambda e: e.with_data(train=[e.batch[0]]), gc.DataError, ("label", "tuples")),
    Mistake(
        "a label that is no class",
        lambda e: e.with_data(train=[(e.batch[0], e.batch[1] + 9)]),
        gc.DataError,
        ("Label", "no class", "0 to 3"),
    ),
    Mistake("labels for half", lambda e: e.with_data(train=[(e.batch[0], e.batch[1][:3])]), gc.DataError, ("Labels",)),
    Mistake("a feed that fails", lambda e: e.with_data(feed=raises), gc.DataError, ("feed", "speed")),
    Mistake("a feed that is no function", lambda e: e.with_data(feed="images"), gc.DataError, ("feed", "callable")),
    Mistake(
        "data that cannot be read", lambda e: e.with_data(train=BrokenLoader()), gc.DataError, ("train", "No such")
    ),
    Mistake("evaluation without metric", lambda e: e.with_data(metric=None), gc.DataError, ("metric", "accuracy")),
    Mistake("a metric without evaluation", lambda e: e.with_data(evaluation=None), gc.DataError, ("evaluation=",)),
    Mistake(
        "a metric that is NaN",
        lambda e: e.with_data(metric=lambda o, b: torch.full((6,), math.nan)),
        gc.DataError,
        ("metric", "nan", "example 0", "labels"),
    ),
    Mistake(
        "a metric of one number",
        lambda e: e.with_data(metric=lambda o, b: torch.tensor(0.5)),
        gc.DataError,
        ("metric", "one value for each example"),
    ),
    Mistake(
        "a metric of another length",
        lambda e: e.with_data(metric=lambda o, b: torch.ones(5)),
        gc.DataError,
        ("5 values", "6 examples"),
    ),
    Mistake("a metric that fails", lambda e: e.with_data(metric=raises), gc.DataError, ("metric", "speed", "outputs")),
    Mistake("a metric by name", lambda e: e.with_data(metric="accuracy"), gc.DataError, ("metric", "callable")),
    Mistake(
        "an aggregate that fails",
        lambda e: e.with_data(metric=BrokenAggregate()),
        gc.DataError,
        ("BrokenAggregate", "aggregate", "division"),
    ),
    Mistake("a loss of many numbers", lambda e: e.with_data(loss=lambda o, b: o), gc.DataError, ("loss", "scalar")),
    Mistake("a loss that is NaN", lambda e: e.with_data(loss=lambda o, b: o.sum() * math.nan), gc.DataError, ("loss",)),
    Mistake("a loss that fails", lambda e: e.with_data(loss=raises), gc.DataError, ("loss", "speed", "outputs, batch")),
    Mistake(
        "a loss without gradient",
        lambda e: e.compress(gc.Finetune(), replace(e.data, loss=lambda o, b: o.detach().sum())),
        gc.DataError,
        ("loss", "gradient"),
    ),
]

MODEL = [
    Mistake(
        "a class instead of a model", lambda e: e.compress(model=Net), gc.ModelError, ("class Net", "not its class")
    ),
    Mistake(
        "weights instead of a model", lambda e: e.compress(model=e.model.state_dict()), gc.ModelError, ("nn.Module",)
    ),
    Mistake("a path instead of a model", lambda e: e.compress(model="net.pt"), gc.ModelError, ("str", "path")),
    Mistake("a model without parameters", lambda e: e.compress(model=nn.ReLU()), gc.ModelError, ("no parameters",)),
    Mistake("meta tensors", lambda e: e.compress(model=meta_model()), gc.ModelError, ("conv.weight", "Load")),
    Mistake("uninitialized layers", lambda e: e.compress(model=nn.LazyLinear(3)), gc.ModelError, ("weight", "Run")),
    Mistake(
        "NaN weights", lambda e: e.compress(model=nan_model(e)), gc.ModelError, ("head.weight", "NaN", "checkpoint")
    ),
    Mistake(
        "a model that cannot be copied", lambda e: e.compress(model=Unpicklable()), gc.ModelError, ("copied", "detach")
    ),
    Mistake("a class as teacher", lambda e: e.compress(teacher=Net), gc.ModelError, ("teacher", "class Net")),
    Mistake(
        "a teacher with other classes",
        lambda e: e.compress(gc.Distill(), teacher=Net(7)),
        gc.ConfigError,
        ("teacher", "(6, 7)", "same classes"),
    ),
    Mistake(
        "a teacher of other inputs",
        lambda e: e.compress(gc.Distill(), teacher=nn.Linear(8, 4)),
        gc.GracileError,
        ("teacher", "does not run"),
    ),
]

STEPS = [
    Mistake("no step", lambda e: e.compress(step=[gc.Prune(0.3)]), gc.ConfigError, ("not a step", "Recipe")),
    Mistake("a class instead of a step", lambda e: e.compress(step=gc.Prune), gc.ConfigError, ("not a step", "Prune(")),
    Mistake("an empty recipe", lambda e: gc.Recipe(), gc.ConfigError, ("no steps", "Recipe(Prune")),
    Mistake("a number in a recipe", lambda e: gc.Recipe(gc.Prune(0.3), 4), gc.ConfigError, ("4", "not a step")),
    Mistake("all weights", lambda e: gc.Prune(1.0), gc.ConfigError, ("1.0", "below 1", "Prune(0.3)")),
    Mistake("a percentage", lambda e: gc.Prune(30), gc.ConfigError, ("30", "below 1")),
    Mistake("a negative fraction", lambda e: gc.Prune(-0.1), gc.ConfigError, ("-0.1", "above 0")),
    Mistake("a truth value as fraction", lambda e: gc.Prune(True), gc.ConfigError, ("True", "fraction")),
    Mistake("NaN as fraction", lambda e: gc.Prune(math.nan), gc.ConfigError, ("nan", "fraction")),
    Mistake("a text as fraction", lambda e: gc.Prune("0.3"), gc.ConfigError, ("'0.3'", "fraction")),
    Mistake("no amount", lambda e: gc.Prune(), gc.ConfigError, ("no amount", "below=")),
    Mistake("two amounts", lambda e: gc.Prune(0.3, below=1e-3), gc.ConfigError, ("fraction and below", "one of")),
    Mistake("a negative threshold", lambda e: gc.Prune(below=-1.0), gc.ConfigError, ("below", "positive")),
    Mistake(
        "a threshold below all", lambda e: e.compress(gc.Prune(below=1e-30)), gc.NothingChangedError, ("no weight",)
    ),
    Mistake("a number as budget", lambda e: gc.Prune(to=0.5, pattern=gc.Channels()), gc.ConfigError, ("MACs(0.5)",)),
    Mistake("a budget for weights", lambda e: gc.Prune(to=gc.MACs(0.5)), gc.ConfigError, ("Channels()",)),
    Mistake("a negative budget", lambda e: gc.MACs(-1), gc.ConfigError, ("MACs(-1)", "positive")),
    Mistake(
        "a budget that is met",
        lambda e: e.compress(gc.Prune(to=gc.MACs(1e9), pattern=gc.Channels())),
        gc.ConfigError,
        ("within this budget", "MACs"),
    ),
    Mistake(
        "a budget out of reach",
        lambda e: e.compress(gc.Prune(to=gc.MACs(1e-4), pattern=gc.Channels())),
        gc.ConfigError,
        ("cannot be met", "nearest", "at least"),
    ),
    Mistake(
        "a latency without target",
        lambda e: e.compress(gc.Prune(to=gc.Latency(0.5), pattern=gc.Channels())),
        gc.ConfigError,
        ("no target", "OnnxRuntime()"),
    ),
    Mistake(
        "a latency of what is no target",
        lambda e: e.compress(gc.Prune(to=gc.Latency(0.5, target="ort"), pattern=gc.Channels())),
        gc.ConfigError,
        ("'ort'", "OnnxRuntime()"),
    ),
    Mistake("all of a group kept", lambda e: gc.NM(4, 4), gc.ConfigError, ("keep=4", "of=4", "below of")),
    Mistake("an amount for N:M", lambda e: gc.Prune(0.5, pattern=gc.NM(2, 4)), gc.ConfigError, ("give none",)),
    Mistake("a pattern by name", lambda e: gc.Prune(0.3, pattern="channels"), gc.ConfigError, ("Channels()",)),
    Mistake("a criterion by name", lambda e: gc.Prune(0.3, criterion="taylor"), gc.ConfigError, ("Taylor()",)),
    Mistake("a criterion's class", lambda e: gc.Prune(0.3, criterion=gc.Magnitude), gc.ConfigError, ("Magnitude()",)),
    Mistake("an allocation by name", lambda e: gc.Prune(0.3, allocation="global"), gc.ConfigError, ("GlobalRank()",)),
    Mistake("no examples", lambda e: gc.Prune(0.3, examples=0), gc.ConfigError, ("examples", "at least 1")),
    Mistake(
        "gradients without a loss",
        lambda e: e.compress(gc.Prune(0.3, criterion=gc.Taylor()), replace(e.data, loss=None)),
        gc.ConfigError,
        ("Taylor", "gradients", "loss="),
    ),
    Mistake(
        "channels without data",
        lambda e: e.compress(gc.Prune(0.3, pattern=gc.Channels()), gc.Data()),
        gc.DataError,
        ("calibration",),
    ),
    Mistake(
        "heads where there are none",
        lambda e: e.compress(gc.Prune(0.3, pattern=gc.Heads())),
        gc.ConfigError,
        ("Heads()",),
    ),
    Mistake(
        "an unknown layer",
        lambda e: e.compress(gc.only("blocks.*", gc.Prune(0.3))),
        gc.ConfigError,
        ("blocks.*", "conv"),
    ),
    Mistake(
        "an unknown exclusion", lambda e: e.compress(gc.Prune(0.3, exclude=("heed",))), gc.ConfigError, ("heed", "head")
    ),
    Mistake("an exclusion as a text", lambda e: gc.Prune(0.3, exclude="head"), gc.ConfigError, ("exclude", "tuple")),
    Mistake("only without a step", lambda e: gc.only("head", 0.3), gc.ConfigError, ("not a step",)),
    Mistake("only without a pattern", lambda e: gc.only("", gc.Prune(0.3)), gc.ConfigError, ("pattern",)),
    Mistake("a format by name", lambda e: gc.Quantize("int8"), gc.ConfigError, ("'int8'", "W8A8")),
    Mistake("a scheme without its group", lambda e: gc.Quantize(gc.W4A16), gc.ConfigError, ("W4A16(group=",)),
    Mistake("nine bits", lambda e: gc.Int(9), gc.ConfigError, ("9", "2 to 8")),
    Mistake("a fixed point of factor 0", lambda e: gc.FixedPoint(0), gc.ConfigError, ("factor", "positive")),
    Mistake(
        "a group of nothing",
        lambda e: e.compress(gc.Quantize(gc.W4A16(group=0))),
        gc.ConfigError,
        ("PerGroup(size=0)", "at least 1"),
    ),
    Mistake("ranges without data", lambda e: e.compress(gc.Quantize(gc.W8A8), gc.Data()), gc.DataError, ("W8A16",)),
    Mistake("ranges by name", lambda e: gc.Quantize(gc.W8A8, ranges="mse"), gc.ConfigError, ("MinMax()",)),
    Mistake(
        "channels of a quantized model",
        lambda e: e.compress(
            gc.Prune(0.3, pattern=gc.Channels()), model=gc.compress(e.model, gc.Quantize(gc.W8A8), e.data).model
        ),
        gc.ConfigError,
        ("quantized",),
    ),
    Mistake(
        "quantized twice",
        lambda e: e.compress(gc.Quantize(gc.W8A16), model=gc.compress(e.model, gc.Quantize(gc.W8A16), e.data).model),
        gc.NothingChangedError,
        ("conv", "already"),
    ),
    Mistake("no epochs", lambda e: gc.Distill(epochs=0), gc.ConfigError, ("epochs=0", "at least 1")),
    Mistake("half an epoch", lambda e: gc.Finetune(epochs=0.5), gc.ConfigError, ("epochs=0.5", "whole number")),
    Mistake("a loss not in a tuple", lambda e: gc.Distill(losses=gc.SoftLabels()), gc.ConfigError, ("losses", "tuple")),
    Mistake(
        "a temperature of 0", lambda e: gc.SoftLabels(temperature=0), gc.ConfigError, ("temperature=0", "positive")
    ),
    Mistake(
        "a temperature as text", lambda e: gc.SoftLabels(temperature="4"), gc.ConfigError, ("temperature", "positive")
    ),
    Mistake("a learning rate of 0", lambda e: SGD(learning_rate=0), gc.ConfigError, ("learning_rate=0", "positive")),
    Mistake(
        "an optimizer of torch", lambda e: gc.Distill(optimizer=torch.optim.SGD), gc.ConfigError, ("optimizer", "SGD(")
    ),
    Mistake("only true labels", lambda e: gc.Distill(label_weight=1.0), gc.ConfigError, ("label_weight", "[0, 1)")),
    Mistake(
        "distil without training data",
        lambda e: e.compress(gc.Distill(), replace(e.data, train=None)),
        gc.DataError,
        ("train=",),
    ),
    Mistake(
        "finetune without a loss",
        lambda e: e.compress(gc.Finetune(), replace(e.data, loss=None)),
        gc.DataError,
        ("loss=",),
    ),
    Mistake(
        "a learning rate that explodes",
        lambda e: e.compress(gc.Finetune(epochs=3, optimizer=AdamW(learning_rate=1e38))),
        gc.DataError,
        ("not finite", "learning rate"),
    ),
    Mistake(
        "a second step that cannot be",
        lambda e: e.compress(gc.Recipe(gc.Prune(0.3), gc.Quantize(gc.Int(4, gc.formats.PerChannel(2))))),
        gc.ConfigError,
        ("PerChannel(axis=2)", "no such axis"),
    ),
    Mistake("a seed as text", lambda e: e.compress(seed="zero"), gc.ConfigError, ("seed", "'zero'", "whole number")),
]

TARGETS = [
    Mistake("an unknown precision", lambda e: gc.OnnxRuntime(precision="int8"), gc.ConfigError, ("int8", "f32")),
    Mistake("no threads", lambda e: gc.OpenVINO(threads=0), gc.ConfigError, ("threads", "whole number from 1")),
    Mistake(
        "a target by name",
        lambda e: e.compress(target="onnxruntime"),
        gc.ConfigError,
        ("'onnxruntime'", "OnnxRuntime()"),
    ),
    Mistake(
        "a target's class",
        lambda e: e.compress(target=gc.OnnxRuntime),
        gc.ConfigError,
        ("OnnxRuntime", "OnnxRuntime()"),
    ),
    Mistake("a goal for no target", lambda e: gc.Goal(target="onnxruntime"), gc.ConfigError, ("not a target",)),
    Mistake("a goal for a target's class", lambda e: gc.Goal(target=gc.PyTorch), gc.ConfigError, ("not a target",)),
    Mistake("a negative drop", lambda e: gc.Goal(target=gc.PyTorch(), max_drop=-0.1), gc.ConfigError, ("max_drop",)),
    Mistake(
        "an unknown objective",
        lambda e: gc.Goal(target=gc.PyTorch(), objective="speed"),
        gc.ConfigError,
        ("'latency'",),
    ),
    Mistake(
        "a limit that is no budget",
        lambda e: gc.Goal(target=gc.PyTorch(), limits=(0.4,)),
        gc.ConfigError,
        ("0.4", "Latency"),
    ),
    Mistake(
        "a limit not in a tuple",
        lambda e: gc.Goal(target=gc.PyTorch(), limits=gc.MACs(0.5)),
        gc.ConfigError,
        ("limits", "tuple"),
    ),
    Mistake(
        "a confidence of 95", lambda e: gc.Goal(target=gc.PyTorch(), confidence=95), gc.ConfigError, ("confidence",)
    ),
    Mistake(
        "a confidence as text",
        lambda e: gc.Goal(target=gc.PyTorch(), confidence="95 %"),
        gc.ConfigError,
        ("confidence",),
    ),
    Mistake("a batch size of 0", lambda e: gc.Goal(target=gc.PyTorch(), batch_size=0), gc.ConfigError, ("batch_size",)),
    Mistake(
        "half an epoch for a candidate", lambda e: gc.Goal(target=gc.PyTorch(), epochs=1.5), gc.ConfigError, ("epochs",)
    ),
    Mistake("no goal", lambda e: e.optimize(goal=0.01), gc.ConfigError, ("gracile.Goal", "float")),
    Mistake(
        "optimize without evaluation data",
        lambda e: e.optimize(data=replace(e.data, evaluation=None, metric=None)),
        gc.DataError,
        ("evaluation=", "metric="),
    ),
    Mistake(
        "optimize for an absent runtime",
        lambda e: (e.without("onnxruntime"), e.optimize(gc.Goal(target=gc.OnnxRuntime()))),
        gc.TargetError,
        ("onnxruntime", "pip install 'gracile[onnxruntime]'"),
    ),
    Mistake(
        "compress for an absent runtime",
        lambda e: (e.without("openvino"), e.compress(target=gc.OpenVINO())),
        gc.TargetError,
        ("openvino", "pip install 'gracile[openvino]'"),
    ),
    Mistake(
        "export without the exporter",
        lambda e: (e.without("onnxscript"), gc.OnnxRuntime().export(e.model, e.batch[0], e.folder / "m.onnx")),
        gc.MissingExtraError,
        ("onnxscript", "pip install 'gracile[onnxruntime]'"),
    ),
    Mistake(
        "export to no target",
        lambda e: gc.export(e.model, "ort", e.folder / "m", e.batch),
        gc.TargetError,
        ("OnnxRuntime()",),
    ),
    Mistake(
        "export of no model",
        lambda e: gc.export(Net, gc.PyTorch(), e.folder / "m", e.batch),
        gc.ModelError,
        ("Module",),
    ),
    Mistake(
        "export with a wrong example",
        lambda e: gc.export(e.model, gc.PyTorch(), e.folder / "m", wide(2)[0]),
        gc.ModelError,
        ("does not run", "example"),
    ),
]

FILES = [
    Mistake(
        "load from nowhere", lambda e: gc.load(e.folder / "none", Net()), gc.ArtifactError, ("none", "compression.json")
    ),
    Mistake(
        "load a file",
        lambda e: ((e.folder / "f").write_text("x"), gc.load(e.folder / "f", Net())),
        gc.ArtifactError,
        ("directory",),
    ),
    Mistake(
        "load into another class", lambda e: gc.load(e.saved(), nn.Linear(3, 2)), gc.ArtifactError, ("Net", "Linear")
    ),
    Mistake(
        "load into other sizes", lambda e: gc.load(e.saved(), Net(9)), gc.ArtifactError, ("head", "same arguments")
    ),
    Mistake("load into a class", lambda e: gc.load(e.saved(), Net), gc.ArtifactError, ("instance",)),
    Mistake(
        "the directory of another run",
        lambda e: [gc.compress(e.model, gc.Prune(x), e.data, run_dir=e.folder / "run") for x in (0.3, 0.4)],
        gc.RunError,
        ("another run", "recipe", "another directory"),
    ),
    Mistake(
        "a file as run directory",
        lambda e: ((e.folder / "f").write_text("x"), e.compress(run_dir=e.folder / "f")),
        gc.RunError,
        ("f'", "place"),
    ),
    Mistake(
        "save over other files",
        lambda e: (
            (e.folder / "notes.txt").write_text("x"),
            gc.compress(e.model, gc.Prune(0.3), e.data).save(e.folder),
        ),
        gc.RunError,
        ("other things", "new directory"),
    ),
]

MISTAKES = [*DATA, *MODEL, *STEPS, *TARGETS, *FILES]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed call could leave changed."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "layers": {name: type(m) for name, m in model.named_modules()},
    }


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_a_mistake_is_explained_before_the_model_is_touched(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    env = Env(tmp_path, monkeypatch)
    before = state_of(env.model)
    with pytest.raises(gc.GracileError) as caught:
        mistake.call(env)
    message = str(caught.value)
    assert isinstance(caught.value, mistake.error), f"{type(caught.value).__name__}: {message}"
    assert not [word for word in mistake.words if word not in message], message
    lines = message.splitlines()
    assert len(lines) <= 6, message
    assert max(map(len, lines)) <= 300, message
    after = state_of(env.model)
    tensors, same = after.pop("tensors"), before.pop("tensors")
    assert after == before
    assert list(tensors) == list(same)
    assert all(torch.equal(t, same[n]) for n, t in tensors.items())


def test_there_are_at_least_forty_and_no_two_alike():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) >= 40


USAGE, FAILED, NOT_MET = 2, 1, 3
DEMO = ("gracile.demo:load_model", "gracile.demo:load_data")
COMMANDS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a fraction of 30": (("compress", DEMO[0], "--data", DEMO[1], "--prune", "30"), USAGE, "below 1"),
    "nothing to do": (("compress", DEMO[0]), USAGE, "Nothing to do"),
    "an unknown factory": (("inspect", "gracile.demo:load_modell"), USAGE, "load_modell"),
    "an unknown format": (("compress", DEMO[0], "--quantize", "int99"), USAGE, "int99"),
    "an unknown option": (("compress", DEMO[0], "--prun", "0.3"), USAGE, "--prune"),
    "no data": (("compress", DEMO[0], "--quantize", "w8a8"), FAILED, "calibration"),
    "no report": (("report", "nowhere"), FAILED, "nowhere"),
    "no model there": (("inspect", "nowhere.onnx"), USAGE, "nowhere.onnx"),
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_mistake_at_the_shell_has_no_traceback_and_the_right_exit_code(name: str, tmp_path: Path):
    arguments, code, word = COMMANDS[name]
    done = subprocess.run(
        [sys.executable, "-m", "gracile", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(gc.__file__).resolve().parents[1])},
        check=False,
    )
    assert word in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 8
    assert done.stdout == ""
