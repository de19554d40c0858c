from __future__ import annotations

import pytest

from gracile.errors import ConfigError
from gracile.select import Select, check_exclude

NAMES = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.10.conv1", "head"]


def chosen(select: Select) -> list[str]:
    return [name for name in NAMES if select.matches(name)]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (Select(), NAMES),
        (Select().narrowed("stem"), ["stem"]),
        (Select().narrowed("blocks"), NAMES[1:5]),
        (Select().narrowed("blocks.1"), ["blocks.1.conv1"]),
        (Select().narrowed("blocks.?.conv1"), ["blocks.0.conv1", "blocks.1.conv1"]),
        (Select().narrowed("*conv2", "head"), ["blocks.0.conv2", "head"]),
        (Select().narrowed("blocks").narrowed("*.conv1"), ["blocks.0.conv1", "blocks.1.conv1", "blocks.10.conv1"]),
        (Select().without("blocks.0", "head"), ["stem", "blocks.1.conv1", "blocks.10.conv1"]),
        (Select().narrowed("blocks").without("*conv1"), ["blocks.0.conv2"]),
        (Select().narrowed("BLOCKS"), []),
        (Select().narrowed("head").narrowed("stem"), []),
    ],
)
def test_patterns(select: Select, names: list[str]) -> None:
    assert chosen(select) == names


def test_a_pattern_that_matches_nothing_names_what_comes_close() -> None:
    Select().narrowed("blocks.0", "head").without("stem").check(NAMES)
    with pytest.raises(ConfigError, match=r"No layer matches 'blocks\.0\.conv3'[\s\S]*blocks\.0\.conv1"):
        Select().narrowed("stem").without("blocks.0.conv3").check(NAMES)
    with pytest.raises(ConfigError, match="none at all"):
        Select().narrowed("x").check([])
    with pytest.raises(ConfigError, match=r"stem, blocks\.0\.conv1, blocks\.0\.conv2"):
        Select().narrowed("§§§").check(iter(NAMES))


@pytest.mark.parametrize("bad", ["head", ("",), (3,), None, {"head"}])
def test_exclusions_are_a_tuple_of_patterns(bad: object) -> None:
    check_exclude("Prune", ("head", "a.*"))
    check_exclude("Prune", ())
    with pytest.raises(ConfigError, match=r"Prune\(exclude="):
        check_exclude("Prune", bad)
