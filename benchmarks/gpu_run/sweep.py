"""Measure the launches around the default launch of the fastest formulations, one change at a time.

A launch is compared on the first shape, for each number of tokens, in the mode of the layer
benchmark. Its result is judged before it is timed.
"""

import dataclasses
import functools
import sys
from unittest import mock

import torch

from benchmarks.cell import MODES, Timed, mode_of
from benchmarks.contenders import of_formulation, rotated
from benchmarks.judgement import Judge, select
from benchmarks.tables import markdown
from int4_lora.compiled import layouts
from int4_lora.compiled.formulations import FORMULATIONS, TILES, tiles
from int4_lora.compiled.formulations.kernel_launches import launching
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.compiled.selection.timing import measure

__all__ = ["can_vary", "neighbours", "sweep", "variants"]

FACTORS = (0.5, 2, 4)


def neighbours(launch):
    """Yield a launch, and the launches in which one number is another multiple of it.

    Args:
        launch: a dataclass of integers; None stands for a number that it does not have.
    """
    yield launch
    for name, value in dataclasses.asdict(launch).items():
        for factor in FACTORS if value is not None else ():
            if factor * value >= 1:
                yield dataclasses.replace(launch, **{name: int(factor * value)})


def can_vary(formulation):
    """Return whether a formulation fixes the launch of a kernel, or the size of its blocks."""
    return formulation.name == TILES.name or hasattr(_module(formulation), "launching")


def variants(formulation, weight, tokens):
    """Return the formulation with its default launch, then with those around it.

    Args:
        formulation: one that ``can_vary``.
        weight: a weight that it takes.
        tokens: rows of x.
    """
    if formulation.name == TILES.name:
        usual = tiles.WORKSPACE_BYTES[weight.device.type]
        sizes = [usual, *(int(factor * usual) for factor in FACTORS)]
        return [
            dataclasses.replace(
                TILES,
                name=f"tiles {workspace / 2**20:g} MiB",
                base=functools.partial(tiles.base, workspace=workspace),
                blocks=None,  # on a CPU, the blocks outside of the graph would ignore it
            )
            for workspace in sizes
        ]
    usual = _default_launch(formulation, weight, tokens)
    return [
        dataclasses.replace(
            formulation,
            name=f"{formulation.name} {_in_words(launch)}",
            backend=functools.partial(_backend, formulation, launch),
        )
        for launch in neighbours(usual)
    ]


def _module(formulation):
    base = formulation.base
    return sys.modules[getattr(base, "func", base).__module__]


def _default_launch(formulation, weight, tokens):
    """Return the launch that the formulation's backend fixes."""
    bucket = bucket_of(tokens, weight.device.type)
    with mock.patch.object(_module(formulation), "launching") as fixed:
        formulation.backend(weight, bucket)
    return fixed.call_args.args[0]


def _backend(formulation, launch, weight, bucket):
    """Return the formulation's backend with another launch."""

    def other(usual, *others):
        return launching(launch, *others)

    with mock.patch.object(_module(formulation), "launching", other):
        return formulation.backend(weight, bucket)


def _in_words(launch):
    numbers = dataclasses.asdict(launch).items()
    return " ".join(f"{value} {name}" for name, value in numbers if value is not None)


def sweep(run):
    """Yield the rows measured so far, as a record and as a table."""
    rows = []
    for tokens in run.options.tokens:
        if run.late():
            return
        layer = run.layer(tokens)
        varied = [name for name, one in FORMULATIONS.items() if can_vary(one)]
        formulation = run.fastest(tokens, varied) or TILES
        rows.append(_row(run, layer, formulation))
        yield {"rows": rows}, _table(rows)


@torch.inference_mode()
def _row(run, layer, formulation):
    weights = _weights(layer, formulation)
    offered = variants(formulation, weights[0], layer.tokens)
    mode, judge, ready, refused = mode_of(layer.device.type, False), Judge(layer), {}, {}
    contenders = [of_formulation(launched, layer, weights) for launched in offered]
    for contender in rotated(contenders):
        if ready and run.late():
            refused[contender.name] = "no time was left"
            continue
        right, wrong = select([contender], MODES[mode], judge)
        ready |= right
        refused |= wrong
    options = run.options
    calls = {name: candidate.run for name, candidate in ready.items()}
    times = measure(calls, rounds=options.rounds, budget=options.budget)
    layers = {name: candidate.layers for name, candidate in ready.items()}
    milliseconds = Timed(times, layers, refused, {}).milliseconds(times)
    if milliseconds:
        fastest = min(milliseconds, key=milliseconds.get)
        run.fastest_launches |= {
            launched.name: launched
            for launched, contender in zip(offered, contenders, strict=True)
            if contender.name == fastest
        }
    return {
        "rows": layer.rows,
        "columns": layer.columns,
        "tokens": layer.tokens,
        "formulation": formulation.name,
        "default": contenders[0].name,
        "milliseconds": milliseconds,
        "spread": {name: time.spread for name, time in times.items()},
        "refused": refused,
    }


def _weights(layer, formulation):
    """Return copies of the weight in the first layout that the formulation reads."""
    for layout in layouts(layer.weight):
        weights = layer.in_layout(layout)
        if formulation.takes(weights[0], layer.dtype, layer.tokens):
            return weights
    raise ValueError(f"no layout of the weight is one that {formulation.name} reads")


def _table(rows):
    lines = []
    for row in rows:
        shape = f"{row['rows']} x {row['columns']}"
        times = row["milliseconds"]
        for name in sorted(times, key=times.get):
            spread = f"{times[name]:.5f} ±{100 * row['spread'][name]:.0f} %"
            usual = "default" if name == row["default"] else ""
            lines.append([shape, str(row["tokens"]), name, spread, usual])
        for name, why in row["refused"].items():
            lines.append([shape, str(row["tokens"]), name, f"not measured: {why}", ""])
    return markdown(["shape", "M", "launch", "ms", ""], lines)
