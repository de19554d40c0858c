"""Factories by name: modules of the current directory, files anywhere, and what is imported under which name."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from gracile.errors import ConfigError, ModelError
from gracile.inputs.factories import build, find, is_factory_name

NET = "from torch import nn\nmade = 0\ndef make():\n    global made\n    made += 1\n    return nn.Linear(made, 1)\n"


@pytest.fixture(autouse=True)
def _restored(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("shop:make", True),
        ("shop.models:Net.small", True),
        ("dir/net.py:make", True),
        ("C:\\work\\net.py:make", True),
        ("shop", False),
        ("shop:", False),
        ("shop:make()", False),
        ("C:model", False),
        ("C:\\model", False),
    ],
)
def test_what_names_a_factory(name, is_one):
    assert is_factory_name(name) is is_one


def test_a_file_keeps_its_name_and_finds_its_neighbours(tmp_path):
    (tmp_path / "gr_widths.py").write_text("WIDTH = 7\n")
    (tmp_path / "gr_net.py").write_text(
        "from torch import nn\nimport gr_widths\nclass Net(nn.Linear):\n    pass\n"
        "def make():\n    return Net(gr_widths.WIDTH, 1)\n"
    )
    net = build(f"{tmp_path / 'gr_net.py'}:make", nn.Module, ModelError)
    assert net.in_features == 7
    assert type(net).__module__ == "gr_net"  # as a script beside it imports it, so that an artifact finds the class


def test_a_file_named_twice_is_imported_once(tmp_path):
    (tmp_path / "gr_net.py").write_text(NET)
    name = f"{tmp_path / 'gr_net.py'}:make"
    assert build(name, nn.Module, ModelError).in_features == 1
    assert build(name, nn.Module, ModelError).in_features == 2


@pytest.mark.parametrize("stem", ["random", "pytest", "my-net"])
def test_a_file_does_not_take_the_name_of_another_module(tmp_path, stem):
    before = sys.modules.get(stem)
    (tmp_path / f"{stem}.py").write_text(NET)
    assert build(f"{tmp_path / stem}.py:make", nn.Module, ModelError).in_features == 1
    assert sys.modules.get(stem) is before


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, width in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gr_net.py").write_text(f"from torch import nn\nmake = lambda: nn.Linear({width}, 1)\n")
    widths = [build(f"{tmp_path / f / 'gr_net.py'}:make", nn.Module, ModelError).in_features for f in ("a", "b")]
    assert widths == [3, 5]


def test_a_file_that_fails_can_be_mended_and_named_again(tmp_path):
    file = tmp_path / "gr_net.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError.*gr_net.py, line 1"):
        find(f"{file}:make")
    file.write_text(NET)
    assert callable(find(f"{file}:make"))


def test_a_module_of_the_current_directory_and_what_is_inside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gr_shop.py").write_text("from torch import nn\nclass Nets:\n    small = nn.Linear(2, 1)\n")
    assert build("gr_shop:Nets.small", nn.Module, ModelError).in_features == 2  # the object itself, not called


def test_the_cause_of_a_failure_is_kept(tmp_path):
    (tmp_path / "gr_net.py").write_text("def make():\n    raise OSError('no weights')\n")
    with pytest.raises(ModelError, match=r"OSError: no weights \(gr_net.py, line 2\)") as caught:
        build(f"{tmp_path / 'gr_net.py'}:make", nn.Module, ModelError)
    assert isinstance(caught.value.__cause__, OSError)
