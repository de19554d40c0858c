"""Every error a user can cause, each a `GracileError` that says what happened, where, and how to fix it."""

from __future__ import annotations


class GracileError(Exception):
    """Base of all errors raised for a mistake that the user can mend."""


class ConfigError(GracileError, ValueError):
    """A setting is impossible, alone or for this model: a fraction outside [0, 1), a group that does not divide."""


class DataError(GracileError, ValueError):
    """The data given cannot serve: empty, not finite, of the wrong shape, or without the labels a step needs."""


class ModelError(GracileError, ValueError):
    """What was given as a model is not one, or does not run on the data given with it."""


class NothingChangedError(GracileError, ValueError):
    """A step ran and changed nothing, which is never what was asked for."""


class TargetError(GracileError, ValueError):
    """A runtime cannot execute or export what it was asked to."""


class ArtifactError(GracileError, ValueError):
    """A saved model cannot be read: missing, damaged, truncated, newer, or made for another model class."""


class RunError(GracileError, RuntimeError):
    """A run cannot go on: the directory belongs to another run, or the disk refused to take a finished step."""


class MissingExtraError(GracileError, ImportError):
    """An optional package is needed and absent; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'gracile[{extra}]'")
        self.package = package
        self.extra = extra
