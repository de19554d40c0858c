from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.data import (
    Data,
    batch_size,
    call_model,
    device_of,
    inputs_of,
    labels_of,
    logits_of,
    slice_batch,
)
from gracile.errors import DataError

A, B, Y = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return x, h


class Optional(nn.Module):
    def forward(self, x: Tensor, h: Tensor | None = None, *, scale: float = 1.0) -> Any:
        return x, h


class Named(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return input_ids, attention_mask, labels


class Anything(nn.Module):
    def forward(self, **kwargs: Any) -> Any:
        return kwargs


def same(found: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (
        len(found[0]) == len(args)
        and all(a is b for a, b in zip(found[0], args))
        and found[1].keys() == kwargs.keys()
        and all(found[1][k] is kwargs[k] for k in kwargs)
    )


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (One(), A, (A,), {}),
        (One(), (A, Y), (A,), {}),
        (One(), [A, Y], (A,), {}),
        (One(), (A,), (A,), {}),
        (One(), [A], (A,), {}),
        (Two(), (A, B), (A, B), {}),
        (Two(), (A, B, Y), (A, B), {}),
        (Optional(), (A, Y), (A,), {}),
        (Optional(), (A, B, Y), (A, B), {}),
        (nn.Sequential(nn.Linear(3, 3)), (A, Y), (A,), {}),
        (Named(), {"input_ids": A, "labels": Y, "text": "x"}, (), {"input_ids": A}),
        (Named(), UserDict({"input_ids": A, "attention_mask": B}), (), {"input_ids": A, "attention_mask": B}),
        (Anything(), {"a": A, "target": Y, "b": 3}, (), {"a": A, "b": 3}),
    ],
)
def test_what_a_model_is_fed(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert same(inputs_of(model, batch), args, kwargs)


@pytest.mark.parametrize(
    ("fed", "args", "kwargs"),
    [(A, (A,), {}), ((A, B), (A, B), {}), ([A], (A,), {}), ({"x": A, "h": None}, (), {"x": A, "h": None})],
)
def test_feed_says_otherwise(fed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert same(inputs_of(Optional(), {"anything": 1}, lambda batch: fed), args, kwargs)


def test_the_model_is_called_with_it_in_its_own_mode() -> None:
    net = nn.Sequential(nn.Dropout(0.999)).train()
    assert float((call_model(net, (torch.ones(4, 50), Y)) == 0).float().mean()) > 0.9
    assert bool((Data(feed=lambda b: b["x"]).forward(net.eval(), {"x": torch.ones(2)}) == 1).all())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((), "empty tuple"),
        ("text", "A batch is a str"),
        (3, "A batch is a int"),
        ({"a": A}, r"keys \['a'\] has none that Named.forward accepts \(input_ids, attention_mask, labels\)"),
        ({"labels": Y}, "has none that"),
    ],
)
def test_what_cannot_be_fed_is_explained(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inputs_of(Named(), batch)


def test_labels() -> None:
    assert labels_of((A, B, Y)) is Y and labels_of([A, Y]) is Y
    for key in ("labels", "label", "target", "targets"):
        assert labels_of({"x": A, key: Y}) is Y
    assert labels_of((A, [1, 2])).tolist() == [1, 2]
    for batch in (A, (A,), {"x": A}):
        with pytest.raises(DataError, match="no labels"):
            labels_of(batch)


@pytest.mark.parametrize("wrap", [dict, UserDict], ids=lambda w: w.__name__)
def test_batches_are_sliced_through_whatever_holds_them(wrap: Any) -> None:
    batch = wrap({"x": A, "scale": torch.tensor(2.0), "table": torch.ones(7, 2), "name": "n", "labels": Y})
    assert batch_size(batch) == 4
    part = slice_batch(batch, 1, 3)
    assert torch.equal(part["x"], A[1:3]) and part["labels"].tolist() == [1, 2]
    assert part["scale"] == 2 and part["table"].shape == (7, 2) and part["name"] == "n"
    x, y = slice_batch((A, Y), 0, 1)
    assert x.shape == (1, 3) and y.shape == (1,)
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        batch_size(("a", torch.tensor(3.0)))


def test_the_main_output() -> None:
    class Output:
        logits = A

    assert logits_of(A) is A and logits_of({"logits": A, "loss": B}) is A and logits_of(Output()) is A
    assert logits_of({"loss": None, "last_hidden_state": B}) is B and logits_of((B, A)) is B
    with pytest.raises(DataError, match="holds no tensor"):
        logits_of("text")


def test_calibration_falls_back_on_training_data() -> None:
    train, calibration = [(A, Y)], [A]
    assert Data(train=train).calibration_batches is train
    assert Data(train=train, calibration=calibration).calibration_batches is calibration
    assert Data(train=train).has_calibration and not Data().has_calibration
    with pytest.raises(DataError, match="No calibration data"):
        Data(evaluation=train).calibration_batches  # noqa: B018 - a property that raises


@pytest.mark.parametrize("role", ["calibration", "train", "evaluation"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (A, "got Tensor"),
        ({"x": A}, "got dict"),
        ("abc", "got str"),
        (3, "got int"),
        ((x for x in [A]), "one-shot iterator"),
        (iter([A]), "one-shot iterator"),
        (zip([A], [Y]), "one-shot iterator"),
    ],
)
def test_data_that_cannot_be_read_twice_are_refused(role: str, batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Data(**{role: batches})


@pytest.mark.parametrize("role", ["metric", "loss", "feed"])
def test_functions_are_functions(role: str) -> None:
    with pytest.raises(DataError, match=rf"Data\({role}=...\): expected a callable, got str"):
        Data(**{role: "accuracy"})  # type: ignore[arg-type]


def test_the_device_is_the_model_s() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(1, affine=False).to("meta")) == torch.device("meta")
    args, _ = inputs_of(nn.Linear(1, 1, device="meta"), (A, Y))
    assert args[0].is_meta
