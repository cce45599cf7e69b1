"""One row of the table: one shape with one number of tokens, everybody in one run.

The eager reference is measured apart and in a few rounds: it takes as long as hundreds of the
others, and would leave them few rounds and cold caches.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks import modes
from benchmarks.contenders import eager_reference, formulations, own, rotated
from benchmarks.judgement import Judge, select
from benchmarks.operands import Layer
from benchmarks.peers import PEERS
from benchmarks.peers.peer import contenders as contenders_among
from benchmarks.report import rates
from int4_lora.compiled.selection.timing import measure

MODES = {
    "one call": modes.one_call,
    "compiled graph": modes.compiled_graph,
    "CUDA graph": modes.cuda_graph,
}
REFERENCE_ROUNDS = 3
WITHIN_A_GRAPH = "eager: measured one call at a time only"


def mode_of(device, in_a_graph):
    """Return the name of the mode that a device's contenders are run in."""
    if device == "cuda":
        return "CUDA graph"
    return "compiled graph" if in_a_graph else "one call"


def cell(rows, columns, tokens, dtype, options, copy_bytes_per_second):
    """Measure one shape with one number of tokens.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        dtype: of x, scales and adapters.
        options: the command's.
        copy_bytes_per_second: what a copy reaches on the device.

    Returns:
        What goes into the results as JSON.
    """
    layer = Layer(rows, columns, tokens, dtype, options.group_size, options.device)
    mode = mode_of(options.device, options.in_a_graph)
    peers, refused = contenders_among(layer, PEERS)
    offered = [*own(layer), *peers]
    if mode != "compiled graph":  # there one is chosen that others' graphs can take in
        offered += formulations(layer)
    ready, failed = select(rotated(offered), MODES[mode], Judge(layer))
    times = measure(
        {name: one.run for name, one in ready.items()},
        rounds=options.rounds,
        budget=options.budget,
    )
    layers = {name: one.layers for name, one in ready.items()}
    references = eager_reference(layer)
    if mode == "compiled graph":
        refused |= {one.name: WITHIN_A_GRAPH for one in references}
    else:
        eager = {one.name: modes.one_call(one) for one in references}
        calls = {name: one.run for name, one in eager.items()}
        times |= measure(calls, rounds=REFERENCE_ROUNDS, budget=0)
        layers |= {name: one.layers for name, one in eager.items()}
    found = _described(layer, mode, times, layers, [*offered, *references])
    found["refused"] = {**failed, **refused}
    return {**found, **rates(found, copy_bytes_per_second)}


def _described(layer, mode, times, layers, contenders):
    measured = [one for one in contenders if one.name in times]
    peers = [one for one in measured if one.kind == "peer"]
    return {
        "rows": layer.rows,
        "columns": layer.columns,
        "tokens": layer.tokens,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "group_size": layer.group_size,
        "device": layer.device.type,
        "mode": mode,
        "in_a_graph": mode != "one call",
        "packed_bytes": layer.weight.nbytes,
        "lora_share": layer.lora_share(),
        "milliseconds": {name: 1e3 * one.median / layers[name] for name, one in times.items()},
        "spread": {name: one.spread for name, one in times.items()},
        "rounds": {name: len(one.seconds) for name, one in times.items()},
        "layers": layers,
        "bytes": {
            one.name: layer.bytes_to_move(dense=one.kind == "dense", lora=one.lora)
            for one in measured
        },
        "peers": [one.name for one in peers if not one.lora],
        "lora_peers": [one.name for one in peers if one.lora],
    }
