"""Define a peer, and prepare peers as contenders.

Source: ``benchmarks/results/README.md``.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.contenders import LOOSEST, Contender
from benchmarks.judgement import reason
from benchmarks.operands import Layer


@dataclass(frozen=True)
class Adapters:
    """A kernel that adds the adapters' term to a peer's base.

    Args:
        name: the name in tables, after the peer's name.
        refuses: returns why the kernel cannot run on this machine or take these operands, or None.
        make: returns a function that adds the term to the base, in place or not.
    """

    name: str
    refuses: Callable[[Layer], str | None]
    make: Callable[[Layer], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Peer:
    """Another INT4 layer.

    Args:
        name: the name in tables.
        refuses: returns why the peer cannot run on this machine or take these operands, or None.
        make: returns a function of one copy of the weight, and the copies.
        adapters: the kernel that adds the adapters to the peer's result.
    """

    name: str
    refuses: Callable[[Layer], str | None]
    make: Callable[[Layer], tuple[Callable[[Any], Tensor], list[Any]]]
    adapters: Adapters


def contenders(layer, peers):
    """Return the peers that can run, with and without adapters, and why the others cannot.

    Args:
        layer: the operands.
        peers: the Peers.

    Returns:
        A list of Contenders, and the reasons by the contender's name.
    """
    able, refused = [], {}
    for peer in peers:
        both = f"{peer.name} + {peer.adapters.name}"
        why_not = None if layer.format == "int4" else f"{layer.format}: the peers take int4"
        why_not = why_not or peer.refuses(layer)
        if why_not is None:
            try:
                base, weights = peer.make(layer)
            except Exception as error:  # the other peers are still measured
                why_not = reason(error)
        if why_not is not None:
            refused[peer.name] = refused[both] = why_not
            continue
        able.append(Contender(peer.name, "peer", base, weights))
        try:
            why_not = peer.adapters.refuses(layer)
            add = None if why_not else peer.adapters.make(layer)
        except Exception as error:
            why_not = reason(error)
        if why_not is None:
            layer_of = functools.partial(_both, base, add)
            roundings = {**LOOSEST, "delta_rounded": True}  # x A^T is stored in x's dtype
            able.append(Contender(both, "peer", layer_of, weights, True, roundings))
        else:
            refused[both] = why_not
    return able, refused


def not_importable(*modules):
    """Import modules; return why the first that fails cannot be imported, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a package built for another torch can raise anything
            return f"{module} cannot be imported: {reason(error)}"
    return None


def _both(base, add, weight):
    return add(base(weight))
