"""The command ``int4-lora doctor``.

The requirements come from the metadata of the installed int4-lora.

Source: ``docs/commands/doctor.md``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

import typer

from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.options import AsJson

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

__all__ = ["Need", "doctor", "formulations", "needs"]

PARTS = {
    "": "the layer, checkpoints and adapters",
    "checkpoints": "int4-lora verify",
    "hf": "the demo (with checkpoints)",
    "train": "int4-lora train (with checkpoints and hf)",
}


@dataclass(frozen=True)
class Need:
    """One package that a part of int4-lora needs.

    Args:
        part: the extra that requires the package, "" for the core.
        package: the package's name.
        specifier: the accepted versions.
        found: the installed version, or None.
        fits: whether the installed version is accepted.
        by: what requires the package: "int4-lora", or an installed package whose requirement is not
            met.
    """

    part: str
    package: str
    specifier: str
    found: str | None
    fits: bool
    by: str = "int4-lora"


def doctor(as_json: AsJson = False) -> None:
    """Show which versions are installed and what works with them.

    Also shows what to install, which formulations of the compiled layer can run here, and why the
    others cannot. Exit code 1 if a package that the core needs is missing, or if an installed
    package has a version that int4-lora does not accept.

    Example: int4-lora doctor
    """
    packages = needs()
    works = {
        part: all(need.fits for need in packages if need.part in ("", *_before(part)))
        for part in PARTS
    }
    right = works[""] and all(need.fits for need in packages if need.found is not None)
    if as_json:
        plain = [dataclasses.asdict(need) for need in packages]
        parts = {PARTS[part]: fits for part, fits in works.items()}
        whole = {"right": right, "python": platform.python_version(), "parts": parts}
        rest = {"packages": plain, "formulations": formulations()}
        typer.echo(json.dumps({**whole, **rest}, indent=2))
    else:
        _print(wide_console(), packages, works)
    raise typer.Exit(0 if right else 1)


def needs() -> list[Need]:
    """Return the packages that the installed int4-lora needs, with their installed versions.

    Example:
        >>> next(need.fits for need in needs() if need.package == "torch")
        True
    """
    from packaging.requirements import Requirement

    required = [
        _need(part, Requirement(text))
        for part in PARTS
        for text in requires("int4-lora") or []
        if _is_of(part, Requirement(text))
    ]
    return [*required, *_conflicts(required)]


def formulations() -> dict[str, str | None]:
    """Return why each formulation of the compiled layer cannot run here, or None if it can.

    Example:
        >>> formulations()["definition"] is None
        True
    """
    from int4_lora.compiled.formulations import FORMULATIONS

    return {
        name: _missing(formulation.devices, compiles=not formulation.one_call)
        for name, formulation in FORMULATIONS.items()
    }


def _missing(devices: tuple[str, ...], *, compiles: bool) -> str | None:
    import torch

    if "cpu" not in devices and not torch.cuda.is_available():
        return "meant for a GPU, and torch finds none"
    compiler = os.environ.get("CXX", "g++")
    if compiles and not torch.cuda.is_available() and shutil.which(compiler) is None:
        return f"Inductor needs a C++ compiler: {compiler} is not there"
    return None


def _before(part: str) -> tuple[str, ...]:
    """Return a part and the parts that it needs."""
    return tuple(PARTS)[: tuple(PARTS).index(part) + 1]


def _conflicts(required: Sequence[Need]) -> Iterator[Need]:
    """Yield the requirements of installed packages on one another that are not met."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    parts = {canonicalize_name(need.package): need.part for need in required}
    for package in required:
        for text in requires(package.package) or [] if package.found is not None else []:
            requirement = Requirement(text)
            known = canonicalize_name(requirement.name) in parts
            if known and _is_of("", requirement):
                need = _need(package.part, requirement)
                if need.found is not None and not need.fits:
                    yield dataclasses.replace(need, by=package.package)


def _is_of(part: str, requirement: Requirement) -> bool:
    """Return whether an extra has a requirement, on this Python and platform."""
    if requirement.marker is None:
        return part == ""
    if part == "":
        return requirement.marker.evaluate({"extra": ""})
    if part and requirement.marker.evaluate({"extra": ""}):
        return False  # the core requires it already
    return requirement.marker.evaluate({"extra": part})


def _need(part: str, requirement: Requirement) -> Need:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = None
    fits = found is not None and _contains(requirement, found)
    return Need(part, requirement.name, str(requirement.specifier) or "any", found, fits)


def _contains(requirement: Requirement, found: str) -> bool:
    """Return whether a version is accepted; a source build's version may be unparsable."""
    from packaging.version import InvalidVersion

    try:
        return requirement.specifier.contains(found, prereleases=True)
    except InvalidVersion:
        return not requirement.specifier


def _print(console: Console, packages: Sequence[Need], works: dict[str, bool]) -> None:
    from rich.table import Table

    table = Table(title=f"Python {platform.python_version()}, int4-lora {version('int4-lora')}")
    for title in ("package", "needed", "by", "found", ""):
        table.add_column(title)
    for need in packages:
        verdict = "fits" if need.fits else "missing" if need.found is None else "does not fit"
        style = None if need.fits else "yellow" if need.found is None else "red"
        table.add_row(
            need.package, need.specifier, need.by, need.found or "-", verdict, style=style
        )
    console.print(table)
    for part, fits in works.items():
        name = f"int4-lora[{part}]" if part else "int4-lora"
        hint = "works" if fits else f"install {name}"
        console.print(f"{PARTS[part]}: {hint}", markup=False)
    for name, why in formulations().items():
        console.print(f"formulation {name}: {why or 'can run'}", markup=False)
