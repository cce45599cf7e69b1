"""Measure one row of the table: all contenders with one shape and one number of tokens.

The eager reference is measured separately and in fewer rounds: it takes hundreds of times as long
as the others, so interleaved with them it would leave them few rounds and cold caches.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks import modes
from benchmarks.contenders import eager_reference, formulations, our_layers, rotated
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
    """Return the name of the mode in which contenders run on a device."""
    if device == "cuda":
        return "CUDA graph"
    return "compiled graph" if in_a_graph else "one call"


def cell(rows, columns, tokens, dtype, options, copy_bytes_per_second):
    """Measure one shape with one number of tokens.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        dtype: the dtype of x, scales and adapters.
        options: the command's options.
        copy_bytes_per_second: the bandwidth of a copy on the device.

    Returns:
        The row, as written to the results.
    """
    layer = Layer(rows, columns, tokens, dtype, options.group_size, options.device)
    mode = mode_of(options.device, options.in_a_graph)
    peers, refused = contenders_among(layer, PEERS)
    offered = [*our_layers(layer), *peers]
    if mode != "compiled graph":  # a graph can use only formulations that it can inline
        offered += formulations(layer)
    ready, failed = select(rotated(offered), MODES[mode], Judge(layer))
    times = measure(
        {name: candidate.run for name, candidate in ready.items()},
        rounds=options.rounds,
        budget=options.budget,
    )
    layers = {name: candidate.layers for name, candidate in ready.items()}
    references = eager_reference(layer)
    if mode == "compiled graph":
        refused |= {contender.name: WITHIN_A_GRAPH for contender in references}
    else:
        eager = {contender.name: modes.one_call(contender) for contender in references}
        calls = {name: candidate.run for name, candidate in eager.items()}
        times |= measure(calls, rounds=REFERENCE_ROUNDS, budget=0)
        layers |= {name: candidate.layers for name, candidate in eager.items()}
    row = _described(layer, mode, times, layers, [*offered, *references])
    row["refused"] = {**failed, **refused}
    return {**row, **rates(row, copy_bytes_per_second)}


def _described(layer, mode, times, layers, contenders):
    measured = [contender for contender in contenders if contender.name in times]
    peers = [contender for contender in measured if contender.kind == "peer"]
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
        "milliseconds": {name: 1e3 * time.median / layers[name] for name, time in times.items()},
        "spread": {name: time.spread for name, time in times.items()},
        "rounds": {name: len(time.seconds) for name, time in times.items()},
        "layers": layers,
        "bytes": {
            contender.name: layer.bytes_to_move(
                dense=contender.kind == "dense", lora=contender.lora
            )
            for contender in measured
        },
        "peers": [peer.name for peer in peers if not peer.lora],
        "lora_peers": [peer.name for peer in peers if peer.lora],
    }
