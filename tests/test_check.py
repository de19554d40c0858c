from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile import metrics
from gracile.check import check_request
from gracile.data import Data
from gracile.errors import DataError, GracileError, ModelError
from gracile.losses import cross_entropy

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
NAN = torch.full((4, 3), float("nan"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(x))
        return y


def damaged(name: str) -> Net:
    net = Net()
    net.state_dict()[name].fill_(float("nan"))
    return net


class Unstable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Learning(Net):
    """Writes into its weights whenever it is called."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.mul_(0.99)
        return super().forward(x)


GOOD = Data(calibration=[X], train=[(X, Y)], evaluation=[(X, Y)], metric=metrics.accuracy, loss=cross_entropy)


def test_a_sound_request_passes_and_leaves_the_model_and_random_state_alone() -> None:
    net, teacher = Net().train(), Net()
    net.fc.eval()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4, shuffle=True)
    check_request(net, Data(train=loader, loss=cross_entropy))
    check_request(net, GOOD, teacher)
    check_request(net, Data())
    assert net.training and net.norm.training and not net.fc.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


MISTAKES: list[tuple[Any, Any, Any, type[GracileError], str]] = [
    (Net, GOOD, None, ModelError, "got the class Net"),
    (Net().state_dict(), GOOD, None, ModelError, "got a OrderedDict"),
    ("model.pt", GOOD, None, ModelError, "got a str"),
    (nn.Sequential(nn.ReLU()), Data(), None, ModelError, "no parameters"),
    (Net().to("meta"), Data(), None, ModelError, "meta device"),
    (damaged("fc.weight"), GOOD, None, ModelError, "'fc.weight' holds NaN"),
    (damaged("norm.running_var"), GOOD, None, ModelError, "'norm.running_var' holds NaN"),
    (Net(), [X], None, DataError, "Expected gracile.Data, got a list"),
    (Net(), Data, None, DataError, "got the class Data"),
    (Net(), GOOD, "teacher", ModelError, "The teacher is a str"),
    (Net(), Data(evaluation=[(X, Y)]), None, DataError, "without a metric"),
    (Net(), Data(metric=metrics.accuracy), None, DataError, "without evaluation data"),
    (Net(), Data(calibration=[]), None, DataError, r"Data\(calibration=...\) holds no batches"),
    (Net(), Data(train=[]), None, DataError, r"Data\(train=...\) holds no batches"),
    (Net(), Data(calibration=[NAN]), None, DataError, "calibration batch holds NaN"),
    (Net(), Data(train=[(NAN, Y)]), None, DataError, "train batch holds NaN"),
    (Net(), Data(calibration=[X[:0]]), None, DataError, r"empty tensor of shape \(0, 3\)"),
    (Net(), Data(calibration=[torch.randn(4, 7)]), None, DataError, r"takes \(x\)[\s\S]*of shape \(4, 7\)"),
    (Net(), Data(calibration=["text"]), None, DataError, "A batch is a str"),
    (Net(), Data(calibration=[{"image": X}]), None, DataError, "none that Net.forward accepts"),
    (Net(), Data(calibration=[X], feed=lambda b: (b, b)), None, DataError, "does not run on the first calibration"),
    (Learning(), Data(calibration=[X]), None, ModelError, "writes into its parameter 'fc.weight'"),
    (Unstable(), Data(calibration=[X]), None, ModelError, "answers NaN or infinity"),
    (Net(), Data(train=[X], loss=cross_entropy), None, DataError, "loss|labels"),
    (Net(), Data(train=[(X, Y + 5)], loss=cross_entropy), None, DataError, "."),
    (Net(), Data(train=[(X, Y)], loss=lambda o, b: o), None, DataError, "expected a scalar tensor"),
    (Net(), Data(train=[(X, Y)], loss=lambda o, b: 0.5), None, DataError, "expected a scalar tensor"),
    (Net(), Data(train=[(X, Y)], loss=lambda o, b: o.sum() / 0), None, DataError, "not finite"),
    (Net(), Data(train=[(X, Y)], loss=lambda o: o.sum()), None, DataError, r"loss\(outputs, batch\)"),
    (Net(), Data(evaluation=[X], metric=metrics.accuracy), None, DataError, "labels"),
    (Net(), Data(evaluation=[(X, Y)], metric=lambda o, b: NAN[:, 0]), None, DataError, "NaN|finite"),
]


@pytest.mark.parametrize(("model", "data", "teacher", "error", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_one_error_of_a_few_lines(
    model: Any, data: Any, teacher: Any, error: type[GracileError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        check_request(model, data, teacher)
    assert len(str(caught.value).splitlines()) <= 4 and len(str(caught.value)) < 700
    if isinstance(model, nn.Module):
        assert model.training
