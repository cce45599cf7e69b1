"""Measure one row of the table: all contenders with one shape and one number of tokens.

The eager reference is measured separately and in fewer rounds: it takes hundreds of times as long
as the others, so interleaved with them it would leave them few rounds and cold caches.

Source: ``benchmarks/results/README.md``.
"""

from dataclasses import dataclass

import torch

from benchmarks import modes
from benchmarks.contenders import eager_reference, formulations, our_layers, rotated
from benchmarks.contention import measure_by_turns
from benchmarks.judgement import Judge, select
from benchmarks.operands import Layer
from benchmarks.peers import PEERS
from benchmarks.peers.peer import contenders as contenders_among
from benchmarks.report import rates
from int4_lora.compiled.selection.timing import Times, measure

MODES = {
    "one call": modes.one_call,
    "compiled graph": modes.compiled_graph,
    "CUDA graph": modes.cuda_graph,
}
REFERENCE_ROUNDS = 3
WITHIN_A_GRAPH = "eager: measured one call at a time only"


@dataclass(frozen=True)
class Timed:
    """Contenders that were measured side by side.

    Args:
        times: the ``Times`` of one run, by name.
        layers: the number of layers in one run, by name.
        refused: why the others were not measured, by name.
        beside: the ``Times`` of one run beside busy processes, by name; empty without.
    """

    times: dict[str, Times]
    layers: dict[str, int]
    refused: dict[str, str]
    beside: dict[str, Times]

    def milliseconds(self, times):
        """Return the median time of a layer in milliseconds, by name."""
        return {name: 1e3 * time.median / self.layers[name] for name, time in times.items()}


def mode_of(device, in_a_graph):
    """Return the name of the mode in which contenders run on a device."""
    if device == "cuda":
        return "CUDA graph"
    return "compiled graph" if in_a_graph else "one call"


def timed(layer, offered, mode, options, busy=None):
    """Judge contenders, and measure those that are right side by side.

    Args:
        layer: the operands.
        offered: the contenders.
        mode: a key of ``MODES``.
        options: the command's options, of which ``rounds`` and ``budget`` are read.
        busy: BusyProcesses, to measure beside them, too; or None.
    """
    ready, refused = select(rotated(offered), MODES[mode], Judge(layer))
    calls = {name: candidate.run for name, candidate in ready.items()}
    limits = {"rounds": options.rounds, "budget": options.budget}
    if busy is None:
        times, beside = measure(calls, **limits), {}
    else:
        times, beside = measure_by_turns(calls, busy, **limits)
    layers = {name: candidate.layers for name, candidate in ready.items()}
    return Timed(times, layers, refused, beside)


@torch.inference_mode()
def cell(rows, columns, tokens, dtype, options, copy_bytes_per_second, busy=None):
    """Measure one shape with one number of tokens.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        dtype: the dtype of x, scales and adapters.
        options: the command's options.
        copy_bytes_per_second: the bandwidth of a copy on the device.
        busy: BusyProcesses, to measure beside them, too; or None.

    Returns:
        The row, as written to the results.
    """
    sizes = (rows, columns, tokens, dtype, options.group_size or columns, options.device)
    layer = Layer(*sizes, format=options.format)
    mode = mode_of(options.device, options.in_a_graph)
    peers, refused = contenders_among(layer, PEERS)
    offered = [*our_layers(layer), *peers]
    if mode != "compiled graph":  # a graph can use only formulations that it can inline
        offered += formulations(layer)
    measured = timed(layer, offered, mode, options, busy)
    references = eager_reference(layer)
    if mode == "compiled graph":
        refused |= {contender.name: WITHIN_A_GRAPH for contender in references}
    else:
        eager = {contender.name: modes.one_call(contender) for contender in references}
        calls = {name: candidate.run for name, candidate in eager.items()}
        measured.times.update(measure(calls, rounds=REFERENCE_ROUNDS, budget=0))
        measured.layers.update({name: candidate.layers for name, candidate in eager.items()})
    row = described(layer, mode, measured, [*offered, *references])
    row["refused"] = {**measured.refused, **refused}
    return {**row, **rates(row, copy_bytes_per_second)}


def described(layer, mode, measured, contenders):
    """Return what was measured as a row of the results.

    Args:
        layer: the operands.
        mode: a key of ``MODES``.
        measured: a ``Timed``.
        contenders: the contenders, of which those that were measured are described.
    """
    times = measured.times
    timed_contenders = [contender for contender in contenders if contender.name in times]
    peers = [contender for contender in timed_contenders if contender.kind == "peer"]
    row = {
        "rows": layer.rows,
        "columns": layer.columns,
        "tokens": layer.tokens,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "format": layer.format,
        "group_size": layer.group_size,
        "adapters": layer.stack.adapters,
        "rank": layer.stack.rank,
        "device": layer.device.type,
        "mode": mode,
        "in_a_graph": mode != "one call",
        "packed_bytes": layer.weight.nbytes,
        "lora_share": layer.lora_share(),
        "milliseconds": measured.milliseconds(times),
        "spread": {name: time.spread for name, time in times.items()},
        "rounds": {name: len(time.seconds) for name, time in times.items()},
        "layers": measured.layers,
        "bytes": {
            contender.name: layer.bytes_to_move(
                dense=contender.kind == "dense", lora=contender.lora
            )
            for contender in timed_contenders
        },
        "peers": [peer.name for peer in peers if not peer.lora],
        "lora_peers": [peer.name for peer in peers if peer.lora],
    }
    if measured.beside:
        row["beside_milliseconds"] = measured.milliseconds(measured.beside)
        row["beside_spread"] = {name: time.spread for name, time in measured.beside.items()}
    return row
