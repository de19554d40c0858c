"""Select: which layers a step works on, by name patterns; matching nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gracile.errors import ConfigError


@dataclass(frozen=True)
class Select:
    """Layers whose dotted name matches every one of `include` and none of `exclude`.

    Each entry of `include` is a tuple of shell patterns ("blocks.*.mlp.*"), of which one must match; several entries
    narrow further. A pattern also matches everything below a module it names.
    """

    include: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()

    def matches(self, name: str) -> bool:
        """Whether the layer with this name is selected."""
        included = all(any(_match(name, p) for p in patterns) for patterns in self.include)
        return included and not any(_match(name, p) for p in self.exclude)

    def check(self, names: Iterable[str]) -> None:
        """Raise ConfigError if a pattern matches none of the names, naming what comes close."""
        known = list(names)
        for pattern in [p for patterns in self.include for p in patterns] + list(self.exclude):
            if not any(_match(name, pattern) for name in known):
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
                raise ConfigError(
                    f"No layer matches '{pattern}'.\n  Layers near it: {', '.join(close) or 'none at all'}. "
                    f"`gracile inspect` lists them all."
                )

    def narrowed(self, *patterns: str) -> Select:
        """This selection, and also one of the patterns."""
        return Select((*self.include, tuple(patterns)), self.exclude)

    def without(self, *patterns: str) -> Select:
        """This selection less the layers that match a pattern."""
        return Select(self.include, (*self.exclude, *patterns))


def check_exclude(step: str, exclude: object) -> None:
    """Raise ConfigError unless `exclude` is a tuple of patterns; one string would be read letter by letter."""
    if not isinstance(exclude, (tuple, list)) or not all(isinstance(p, str) and p for p in exclude):
        raise ConfigError(
            f"{step}(exclude={exclude!r}): expected a tuple of layer name patterns, for example ('head', 'blocks.0.*')."
        )


def _match(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
