"""Pieces of the user's own, named `module:object` where a table's row is expected."""

import importlib
import sys
from pathlib import Path
from typing import Any

from jaxfed.config import ConfigError


def is_own(name: str) -> bool:
    """Whether a name is of the form `module:object`."""
    return ":" in name


def load_object(name: str, flag: str) -> Any:
    """Imports `module:object`; modules of the working directory come first.

    Raises:
      ConfigError: if there is no such module or object, or the module cannot be imported.
    """
    module, _, path = name.partition(":")
    here = str(Path.cwd())
    if sys.path[0] not in ("", here):
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # the module may have been written a moment ago
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"--{flag}: got {name!r}, expected module:object, both importable from the working "
            f"directory ({type(error).__name__}: {error})"
        ) from None
    return found


def name_of(piece: Any, fallback: str) -> str:
    """How a piece given in Python is recorded: `module:object`, or `fallback` if it has no name."""
    module, name = getattr(piece, "__module__", None), getattr(piece, "__qualname__", None)
    plain = isinstance(module, str) and isinstance(name, str) and "<" not in name
    return f"{module}:{name}" if plain else fallback
