from __future__ import annotations

import pytest

from gracile import formats
from gracile.errors import ArtifactError
from gracile.formats import (
    W4A16,
    W8A8,
    W8A16,
    FixedPoint,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    format_from_config,
    format_to_config,
)


def test_schemes_are_what_their_names_say() -> None:
    assert (W8A8.weight, W8A8.input) == (Int(8, PerChannel(0)), Int(8, PerTensor(), symmetric=False))
    assert (W8A16.weight, W8A16.input) == (Int(8, PerChannel(0)), None)
    for name in ("W7A8", "W4A8", "W3A8", "W2A8", "W4A4", "W3A3", "W2A2"):
        scheme = getattr(formats, name)
        assert (scheme.name, scheme.weight) == (name, Int(int(name[1]), PerChannel(0)))
        assert scheme.input == Int(int(name[3]), PerTensor(), symmetric=False)
        assert scheme.ends == (None if name == "W7A8" else W8A8)
    for maker, bits in ((formats.W3A16, 3), (formats.W2A16, 2), (W4A16, 4)):
        assert maker(16, symmetric=False).weight == Int(bits, PerGroup(16), symmetric=False)
    assert (W4A16(32).weight, W4A16(32).input, W4A16().name) == (Int(4, PerGroup(32)), None, "W4A16")


@pytest.mark.parametrize("value", [Int(3, PerGroup(8), symmetric=False), FixedPoint(100), PerChannel(1), PerTensor()])
def test_configs_come_back(value: object) -> None:
    assert format_from_config(format_to_config(value)) == value


def test_no_format_comes_back_as_none() -> None:
    assert format_from_config(None) is None


@pytest.mark.parametrize(
    "config",
    [
        {"type": "Scheme"},
        {"type": "W4A16", "group": 3},
        {"type": "Format"},
        {"type": "os"},
        {"type": "__builtins__"},
        {"type": ["Int"]},
        {},
        {"type": "Int", "bits": 99},
        {"type": "Int", "unknown": 1},
        {"type": "Int", "granularity": {"type": "FixedPoint"}},
        "Int",
    ],
)
def test_hostile_configs_are_refused(config: object) -> None:
    with pytest.raises(ArtifactError):
        format_from_config(config)  # type: ignore[arg-type]
