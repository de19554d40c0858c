"""Tiny models and data in a file of the current directory, as a user of the command line has them."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from gracile.cli import main

SHOP = '''
import torch
from torch import nn

import gracile as gc


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(x)))


class Sized(Net):
    def __init__(self, width):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, width), nn.Linear(width, 3)


def make_net():
    torch.manual_seed(0)
    return Net().eval()


def make_sized():
    torch.manual_seed(0)
    return Sized(12).eval()


def make_data():
    """Labels are what the net itself answers, so that its own accuracy is 1."""
    net = make_net()
    images = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = net(images).argmax(-1)
    batches = list(zip(images.split(16), labels.split(16)))
    return gc.Data(
        calibration=[x for x, _ in batches[:2]],
        train=batches[:4],
        evaluation=batches,
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )


def calibration_only():
    return gc.Data(calibration=[torch.randn(4, 1, 6, 6)])


def wrong_shape():
    return gc.Data(calibration=[torch.randn(4, 2, 6, 6)])


def failing():
    raise KeyError("weights.bin")


def nothing():
    return None


def chatty_net():
    print("hello from the factory")
    return make_net()


threshold = 0.5
'''


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The current directory, with `shop.py` in it; what importing it changed is undone."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def run(shop):
    """Run a command line; checks that no traceback reached the user unless asked for."""

    def call(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        shown = result.stdout + result.stderr
        assert result.exit_code == code, f"exit code {result.exit_code}: {shown}\n{result.exception!r}"
        if "--traceback" not in arguments:
            assert "Traceback" not in shown
        return result

    return call


@pytest.fixture
def run_json(run):
    """The same with --json: the data on stdout, on which nothing else may be."""

    def call(*arguments, code=0):
        return json.loads(run(*arguments, "--json", code=code).stdout)

    return call
