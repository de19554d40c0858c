from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from gracile.config import from_config, to_config
from gracile.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    known: ClassVar[int] = 9


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    values: tuple[float, ...] = (1.5, 2.0)
    table: dict[str, Any] = field(default_factory=dict)
    on: bool = True


CLASSES = {"Inner": Inner, "Outer": Outer}


def test_settings_survive_json() -> None:
    value = Outer(Inner(7), (0.1, 1e-300), {"a": (Inner(), None), "b": {"c": "text"}}, False)
    config = json.loads(json.dumps(to_config(value)))
    assert config["inner"] == {"type": "Inner", "size": 7}
    assert from_config(config, CLASSES) == value
    assert from_config(to_config(Outer()), CLASSES) == Outer()


def test_functions_go_by_name_and_do_not_come_back() -> None:
    config = to_config({"f": to_config, "o": object()})
    assert config == {"f": {"callable": "gracile.config:to_config"}, "o": {"type": "object"}}
    with pytest.raises(ConfigError, match=r"cannot carry the function gracile\.config:to_config"):
        from_config(config["f"], CLASSES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "Unknown"}, "Unknown type 'Unknown'[\\s\\S]*Inner, Outer"),
        ({"type": ["Inner"]}, "Unknown type"),
        ({"type": "Inner", "width": 3}, "Inner: .*width"),
        ({"type": "Outer", "inner": {"type": "os.system"}}, "Unknown type"),
    ],
)
def test_what_is_no_setting_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config(config, CLASSES)
