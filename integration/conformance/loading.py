"""The backend that a user names.

Source: ``docs/commands/conform.md``.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points

from int4_lora.reference.conformance import Backend

__all__ = ["GROUP", "load_backend", "registered"]

GROUP = "int4_lora.backends"


def load_backend(spec: str) -> Backend:
    """Return the backend that ``spec`` names.

    Args:
        spec: ``module:object``, ``module`` where the module itself has the functions, or the name
            of an entry point in the group ``int4_lora.backends``. A class is instantiated.

    Raises:
        ValueError: no such module, object or entry point; the message says which.
        TypeError: the object has none of the functions, or its manifest is not valid.

    Example:
        >>> load_backend("int4_lora.reference").functions[0]
        'pack'
    """
    entries = registered()
    if not spec.partition(":")[0]:
        raise ValueError(f"backend must be module:object or a registered name, got {spec!r}")
    if spec in entries:
        under_test = _loaded(entries[spec], spec)
    else:
        name, _, attribute = spec.partition(":")
        under_test = _attribute(_module(name, spec), attribute, spec)
    if isinstance(under_test, type):
        under_test = _instance(under_test, spec)
    return Backend(under_test, spec)


def registered() -> dict[str, EntryPoint]:
    """Return the entry points of the group in installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _instance(cls: type, spec: str) -> object:
    try:
        return cls()
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"backend {spec!r}: making an instance raised {type(error).__name__}: {error}"
        ) from error


def _loaded(entry: EntryPoint, spec: str) -> object:
    try:
        return entry.load()
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(_why(spec, entry.value, error)) from error


def _why(spec: str, module: str, error: BaseException) -> str:
    return f"backend {spec!r}: importing {module!r} raised {type(error).__name__}: {error}"


def _module(name: str, spec: str) -> object:
    here = os.getcwd()
    if here not in sys.path:  # a command's users expect to import from their folder
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        known = ", ".join(sorted(registered())) or "none"
        raise ValueError(
            f"backend {spec!r}: cannot import {name!r}: {error}; registered backends: {known}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(_why(spec, name, error)) from error


def _attribute(module: object, attribute: str, spec: str) -> object:
    value = module
    for part in filter(None, attribute.split(".")):
        if not hasattr(value, part):
            raise ValueError(f"backend {spec!r}: there is no {part!r} in it")
        value = getattr(value, part)
    return value
