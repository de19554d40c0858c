"""Factories named as text: `package.module:factory`, or `path/to/file.py:factory`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from gracile.errors import ConfigError, GracileError

EXAMPLES = "'package.module:factory' or 'path/to/file.py:factory'"


def is_factory_name(name: str) -> bool:
    """Whether a text has the form of a factory's name; a Windows drive ('C:\\model') is no module."""
    module, _, attribute = name.rpartition(":")
    return len(module) > 1 and all(part.isidentifier() for part in attribute.split("."))


def find(name: str) -> Any:
    """The object that a name stands for; its module is imported.

    A dotted module is looked for in the current directory too. A file is imported under its own name, its directory
    searched for what it imports, as Python does for a script. Raises ConfigError where there is none.
    """
    if not is_factory_name(name):
        raise ConfigError(f"'{name}' does not name a factory.\n  Write {EXAMPLES}.")
    source, _, attribute = name.rpartition(":")
    found: Any = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = sorted(n for n, v in vars(found).items() if callable(v) and not n.startswith("_"))
            has = f"\n  It has: {', '.join(known[:12])}." if known else ""
            raise ConfigError(f"'{source}' has no '{part}'.{has}")
        found = getattr(found, part)
    return found


def build(name: str, kind: type, error: type[GracileError]) -> Any:
    """What a named factory returns when called without arguments, or the named object itself if it is a `kind`.

    Raises ConfigError where there is nothing to call, and `error` where the factory fails or returns something else.
    """
    found = find(name)
    if isinstance(found, kind):
        return found
    if not callable(found):
        raise ConfigError(f"'{name}' is a {type(found).__name__}, not a function that returns a {kind.__name__}.")
    try:
        made = found()
    except GracileError:
        raise
    except Exception as failure:
        raise error(f"'{name}' failed: {_described(failure)}") from failure
    if not isinstance(made, kind):
        raise error(f"'{name}' returned {_article(type(made).__name__)}; it must return a {_public_name(kind)}.")
    return made


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"There is no module '{error.name}', here or installed.\n"
                f"  Write {EXAMPLES}; the current directory is searched."
            ) from error
        raise ConfigError(f"Importing '{name}' failed: {_described(error)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"Importing '{name}' failed: {_described(error)}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"There is no file '{path}'.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its classes are looked up there, and two names of one file share it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"Importing '{path}' failed: {_described(error)}") from error
    return module


def _module_name(path: Path) -> str:
    """The file's own name, so that an artifact names its classes as a script would import them; unique if taken."""
    loaded = getattr(sys.modules.get(path.stem), "__file__", None)
    taken = path.stem in sys.modules and (loaded is None or Path(loaded).resolve() != path)
    if path.stem.isidentifier() and path.stem not in sys.stdlib_module_names and not taken:
        return path.stem
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _described(error: BaseException) -> str:
    """The error in one line, with the file and line that raised it."""
    text = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ is not None else None
    place = f" ({Path(where.filename).name}, line {where.lineno})" if where is not None else ""
    return f"{type(error).__name__}: {text[0] if text else 'without a message'}{place}"


def _article(name: str) -> str:
    return "nothing (None)" if name == "NoneType" else f"a {name}"


def _public_name(kind: type) -> str:
    return {"Module": "PyTorch model (nn.Module)", "Data": "gracile.Data"}.get(kind.__name__, kind.__name__)
