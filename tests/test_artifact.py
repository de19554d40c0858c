from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile import artifact
from gracile.errors import ArtifactError, RunError
from gracile.files import sha256_file, sha256_json
from gracile.formats import Int, PerChannel, PerGroup, format_to_config
from gracile.nn import QuantizedLinear
from gracile.surgery import Resize, Swap, apply

MODULE = """
import torch
from torch import nn

class Tied(nn.Module):
    '''A cut, partly quantized model with tied weights, and buffers of several types.'''
    def __init__(self, width=6):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, width), nn.Linear(width, width), nn.Linear(width, 9)
        self.head.weight = self.embed.weight
        self.norm, self.last = nn.BatchNorm1d(9), nn.Linear(9, 4)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
    def forward(self, x):
        return self.last(self.norm(self.head(self.body(self.embed(x)).mean(1))))
"""
KEPT = (0, 2, 3, 5)
EDITS = [
    Resize(
        {"embed.weight:1": KEPT, "body.weight:0": KEPT, "body.weight:1": KEPT, "body.bias:0": KEPT},
        {"embed.embedding_dim": 4, "body.in_features": 4, "body.out_features": 4, "head.in_features": 4},
    ),
    Swap("body", "QuantizedLinear", {"weight": format_to_config(Int(4, PerGroup(2))), "input": None, "output": None}),
    Swap("last", "QuantizedLinear", {"weight": format_to_config(Int(8, PerChannel(0))), "input": None, "output": None}),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of the user's, importable here and in another process."""
    (tmp_path / "users_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("users_nets")
    sys.modules.pop("users_nets", None)


def compressed(module: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = module.Tied().to(dtype)
    for name, value in (("norm.running_mean", 0.3), ("norm.running_var", 2.0)):
        net.get_buffer(name).fill_(value)
    net.get_buffer("steps").fill_(12345678901)
    apply(net, EDITS)
    for layer in ("body", "last"):
        quantized: Any = net.get_submodule(layer)
        assert isinstance(quantized, QuantizedLinear)
        weight = torch.randn(quantized.weight_shape)
        quantized.set_weight(quantized.weight_format.encode(weight))
    return net.eval()


def test_a_fresh_process_gets_the_same_bits(module: Any, tmp_path: Path) -> None:
    x = torch.randint(0, 9, (5, 3))
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        net = compressed(module, getattr(torch, dtype))
        artifact.save(net, tmp_path / dtype, EDITS, {"seed": 3})
        with torch.no_grad():
            torch.save({"x": x, "y": net(x), "state": net.state_dict()}, tmp_path / f"{dtype}.pt")
    script = f"""
        import sys, torch
        sys.path.insert(0, {str(tmp_path)!r})
        import gracile as gc, users_nets
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            path = {str(tmp_path)!r} + "/" + dtype
            expected = torch.load(path + ".pt", weights_only=True)
            for model in (gc.load(path), gc.load(path, users_nets.Tied())):
                state = model.state_dict()
                assert list(state) == list(expected["state"]), state.keys()
                for name, value in expected["state"].items():
                    assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
                with torch.no_grad():
                    assert torch.equal(model(expected["x"]), expected["y"])
                assert model.head.weight is model.embed.weight
                assert not model.training and model.body.in_features == 4
        print("same")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_tied_weights_are_stored_once_and_edits_kept_for_a_further_compression(module: Any, tmp_path: Path) -> None:
    net = compressed(module)
    artifact.save(net, tmp_path / "slim", EDITS)
    journal = artifact.read_journal(tmp_path / "slim")
    assert journal["tied"] == {"head.weight": "embed.weight"}
    loaded: Any = artifact.load(tmp_path / "slim", module.Tied())
    assert loaded.gracile_edits == tuple(EDITS)
    weights = sum(t.numel() * t.element_size() for n, t in net.state_dict().items() if n != "head.weight")
    assert (tmp_path / "slim" / artifact.WEIGHTS).stat().st_size < weights + 4096  # a header of names and offsets


def test_the_global_random_state_is_left_alone_by_loading(module: Any, tmp_path: Path) -> None:
    artifact.save(compressed(module), tmp_path / "slim", EDITS)
    before = torch.random.get_rng_state()
    artifact.load(tmp_path / "slim")
    assert torch.equal(torch.random.get_rng_state(), before)


# What is wrong with an artifact, each by a function that makes it so.


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the journal and put the checksum right again, as an attacker would."""
    journal = json.loads((path / artifact.JOURNAL).read_text())
    changed = change(journal)
    journal = journal if changed is None else changed
    if isinstance(journal, dict):
        journal.pop("checksum", None)
        journal["checksum"] = sha256_json(journal)
    (path / artifact.JOURNAL).write_text(json.dumps(journal))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def replace_weights(path: Path, content: bytes) -> None:
    (path / artifact.WEIGHTS).write_bytes(content)
    forge(path, lambda j: j["sha256"].update({artifact.WEIGHTS: sha256_file(path / artifact.WEIGHTS)}))


def set_edits(edits: Any) -> Callable[[Path], None]:
    return lambda path: forge(path, lambda j: j.update(edits=edits))


HUGE = 10**30
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no directory": shutil.rmtree,
    "empty directory": lambda p: [f.unlink() for f in p.iterdir()],
    "a file instead": lambda p: (shutil.rmtree(p), p.write_text("x")),
    "no journal": lambda p: (p / artifact.JOURNAL).unlink(),
    "no weights": lambda p: (p / artifact.WEIGHTS).unlink(),
    "journal truncated": lambda p: os.truncate(p / artifact.JOURNAL, 100),
    "journal empty": lambda p: os.truncate(p / artifact.JOURNAL, 0),
    "journal binary": lambda p: (p / artifact.JOURNAL).write_bytes(bytes(range(128, 256))),
    "journal nested deeply": lambda p: (p / artifact.JOURNAL).write_text("[" * 100_000),
    "journal edited": lambda p: (p / artifact.JOURNAL).write_text(
        (p / artifact.JOURNAL).read_text().replace('"seed": 3', '"seed": 4')
    ),
    "weights truncated": lambda p: os.truncate(p / artifact.WEIGHTS, 200),
    "one bit of the weights": lambda p: flip(p / artifact.WEIGHTS, -3),
    "one bit of their header": lambda p: flip(p / artifact.WEIGHTS, 20),
    "weights no safetensors": lambda p: replace_weights(p, b"not safetensors at all"),
    "weights of a huge header": lambda p: replace_weights(p, b"\xff" * 64),
    "weights empty": lambda p: replace_weights(p, b""),
    "journal a list": lambda p: forge(p, lambda j: [j]),
    "newer schema": lambda p: forge(p, lambda j: j.update(schema=artifact.SCHEMA + 1)),
    "schema a word": lambda p: forge(p, lambda j: j.update(schema="1")),
    "no edits": lambda p: forge(p, lambda j: j.pop("edits") and None),
    "edits a word": set_edits("none"),
    "edits of null": set_edits([None]),
    "unknown edit": set_edits([{"edit": "Exec", "code": "import os"}]),
    "unknown layer": set_edits([{"edit": "Swap", "name": "body", "layer": "eval", "config": {}}]),
    "settings missing": set_edits([{"edit": "Swap", "name": "body", "layer": "QuantizedLinear", "config": {}}]),
    "settings hostile": set_edits(
        [{"edit": "Swap", "name": "body", "layer": "QuantizedLinear", "config": {"weight": {"type": "os.system"}}}]
    ),
    "settings of other types": set_edits(
        [{"edit": "Swap", "name": "body", "layer": "QuantizedLinear", "config": {"weight": [1], "bias": {}}}]
    ),
    "a group of a word": set_edits(
        [
            {
                "edit": "Swap",
                "name": "body",
                "layer": "QuantizedLinear",
                "config": {"weight": {"type": "Int", "bits": 4, "granularity": {"type": "PerGroup", "size": "x"}}},
            }
        ]
    ),
    "wrong kind of layer": set_edits(
        [{"edit": "Swap", "name": "norm", "layer": "QuantizedConv", "config": {"weight": {"type": "Int", "bits": 8}}}]
    ),
    "index beyond": set_edits([{"edit": "Resize", "keep": {"body.weight:0": [77]}, "attributes": {}}]),
    "index immense": set_edits([{"edit": "Resize", "keep": {"body.weight:0": [HUGE]}, "attributes": {}}]),
    "index negative": set_edits([{"edit": "Resize", "keep": {"body.weight:0": [-2]}, "attributes": {}}]),
    "axis beyond": set_edits([{"edit": "Resize", "keep": {"body.weight:7": [0]}, "attributes": {}}]),
    "attribute of Python": set_edits([{"edit": "Resize", "keep": {}, "attributes": {"__class__": 1}}]),
    "attribute in a chain": set_edits([{"edit": "Resize", "keep": {}, "attributes": {"forward.__globals__.x": 1}}]),
    "edits of another width": set_edits([]),
    "tied to nothing": lambda p: forge(p, lambda j: j.update(tied={"head.weight": "nowhere"})),
    "tied to a list": lambda p: forge(p, lambda j: j.update(tied={"head.weight": ["embed.weight"]})),
    "tied under a new name": lambda p: forge(p, lambda j: j.update(tied={"extra": "embed.weight"})),
    "checksums of nothing": lambda p: forge(p, lambda j: j.update(sha256={})),
    "checksum a list": lambda p: forge(p, lambda j: j.update(sha256={artifact.WEIGHTS: []})),
    "another class": lambda p: forge(p, lambda j: j.update({"class": "torch.nn:Linear"})),
    "class of no name": lambda p: forge(p, lambda j: j.update({"class": ""})),
    "class a function": lambda p: forge(p, lambda j: j.update({"class": "os:system"})),
    "class a number": lambda p: forge(p, lambda j: j.update({"class": 3})),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An artifact, and the module of the class that it holds."""
    folder = tmp_path_factory.mktemp("sound")
    file = folder / "users_nets.py"
    file.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("users_nets", file)
    assert spec is not None and spec.loader is not None
    users = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(users)
    artifact.save(compressed(users), folder / "slim", EDITS, {"seed": 3})
    return folder / "slim", users


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["into an instance", "by class"])
def test_a_damaged_or_hostile_artifact_is_one_clear_error(
    sound: tuple[Path, Any], tmp_path: Path, damage: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, users = sound
    path = tmp_path / "slim"
    shutil.copytree(source, path)
    DAMAGE[damage](path)
    monkeypatch.setitem(sys.modules, "users_nets", users)
    with pytest.raises(ArtifactError) as caught:
        artifact.load(path, users.Tied() if given else None)
    message = str(caught.value)
    assert 20 < len(message) < 600 and len(message.splitlines()) <= 4, message


def test_sound_is_sound(sound: tuple[Path, Any]) -> None:
    """Or the tests above would prove nothing."""
    assert artifact.load(sound[0], sound[1].Tied()) is not None


def test_another_class_or_other_arguments_are_named(sound: tuple[Path, Any]) -> None:
    path, users = sound
    with pytest.raises(ArtifactError, match="holds a Tied, and was given a Sequential"):
        artifact.load(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArtifactError, match="instance"):
        artifact.load(path, users.Tied(width=3))
    with pytest.raises(ArtifactError, match="expected a model instance"):
        artifact.load(path, users.Tied)


class NeedsArguments(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)


def test_a_class_that_cannot_be_built_or_imported_says_what_to_pass(tmp_path: Path) -> None:
    artifact.save(NeedsArguments(3), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"gracile.load\('.*', NeedsArguments\(...\)\)"):
        artifact.load(tmp_path / "a")

    class Local(nn.Linear):
        pass

    artifact.save(Local(3, 3), tmp_path / "b")
    with pytest.raises(ArtifactError, match="cannot be imported here"):
        artifact.load(tmp_path / "b")
    assert isinstance(artifact.load(tmp_path / "b", Local(3, 3)), Local)


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "state"

    def set_extra_state(self, state: Any) -> None: ...


def test_state_that_is_no_tensor_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"_extra_state.*not a tensor"):
        artifact.save(Extra(2, 2), tmp_path / "slim")
    assert not list(tmp_path.iterdir())


class Views(nn.Module):
    """Two buffers that share memory without being the same tensor, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(12.0).reshape(3, 4)
        self.register_buffer("whole", base)
        self.register_buffer("part", base[:2])
        self.register_buffer("turned", base.T)
        self.register_buffer("empty", torch.zeros(0, 3))


def test_views_of_one_memory_are_kept_apart(tmp_path: Path) -> None:
    net = Views()
    artifact.save(net, tmp_path / "slim")
    loaded = artifact.load(tmp_path / "slim", Views())
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_while_writing_leaves_the_earlier_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    artifact.save(net, tmp_path / "slim")
    expected = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight += 1
    monkeypatch.setattr(artifact, "save_file", refuse)
    with pytest.raises(RunError, match=r"No space left on device[\s\S]*Free some space") as caught:
        artifact.save(net, tmp_path / "slim")
    assert str(tmp_path / "slim") in str(caught.value)
    assert os.listdir(tmp_path) == ["slim"]
    loaded: Any = artifact.load(tmp_path / "slim", nn.Sequential(nn.Linear(3, 3)))
    assert torch.equal(loaded[0].weight, expected)


def test_a_disk_that_is_full_leaves_the_earlier_artifact(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk needs root")
    try:
        small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(300, 300))
        artifact.save(small, disk / "slim")
        with pytest.raises(RunError, match=r"No space left on device[\s\S]*Free some space"):
            artifact.save(large, disk / "slim")
        assert os.listdir(disk) == ["slim"]
        loaded: Any = artifact.load(disk / "slim", nn.Sequential(nn.Linear(8, 8)))
        assert torch.equal(loaded[0].weight, small[0].weight)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_half_the_bits_of_a_journal_flipped_one_by_one_never_load_or_crash(
    sound: tuple[Path, Any], tmp_path: Path
) -> None:
    source, users = sound
    path = tmp_path / "slim"
    shutil.copytree(source, path)
    whole = (path / artifact.JOURNAL).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(whole), (150,), generator=generator).tolist():
        bits = bytearray(whole)
        bits[position] ^= 1 << (position % 8)
        (path / artifact.JOURNAL).write_bytes(bytes(bits))
        try:
            loaded = artifact.load(path, users.Tied())
        except ArtifactError:
            continue
        assert json.loads(bits) == json.loads(whole)  # white space alone
        assert isinstance(loaded, nn.Module)


def state_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_saving_does_not_change_the_model(module: Any, tmp_path: Path) -> None:
    net = compressed(module)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    artifact.save(net, tmp_path / "slim", EDITS)
    assert state_equal(net.state_dict(), before) and net.head.weight is net.embed.weight
