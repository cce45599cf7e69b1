"""Replay the vLLM plug-in's operator from a CUDA graph, with other adapter ids than captured.

The operator and the layer are the plug-in's; the engine around them is not there. The step is
compiled as vLLM compiles a model, with the operator as one call, then captured and replayed; on a
CPU it is called. Each result is judged with the ids of its replay. Where vLLM is not installed,
stand-ins give the few functions that the operator's file takes from it.

Source: ``integration/vllm_plugin/layer_operator.py``.
"""

import contextlib
import importlib
import sys
import types
from importlib.util import find_spec
from unittest import mock

import torch

from benchmarks.cell import MODES, mode_of
from benchmarks.contenders import Contender
from benchmarks.judgement import Judge, select
from benchmarks.tables import markdown
from int4_lora.compiled import prepare_lora
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer

__all__ = ["served"]

OPERATOR = "int4_lora.integration.vllm_plugin.layer_operator"
NAME = "layer"


def served(run):
    """Yield the verdicts so far, as a record and as a table."""
    rows, given = [], "installed" if find_spec("vllm") else "a stand-in"
    with _operator() as operator:
        for tokens in run.options.tokens:
            if rows and run.late():
                return
            rows += _rows(operator, run.layer(tokens))
            yield {"vllm": given, "rows": rows}, _table(rows, given)


@contextlib.contextmanager
def _operator():
    """Import the plug-in's operator for the context."""
    stand_ins = {} if find_spec("vllm") else _stand_ins()
    with mock.patch.dict(sys.modules, stand_ins):
        yield importlib.import_module(OPERATOR)
        if stand_ins:
            sys.modules.pop(OPERATOR, None)  # it is bound to them


def _stand_ins():
    """Return stand-ins for the modules that the operator's file imports from vLLM, by name."""
    vllm, utils = types.ModuleType("vllm"), types.ModuleType("vllm.utils")
    context = types.ModuleType("vllm.forward_context")
    context.get_forward_context = None  # replaced for each layer
    functions = types.ModuleType("vllm.utils.torch_utils")
    functions.LayerNameType = str
    functions._encode_layer_name = functions._resolve_layer_name = lambda name: name
    functions.direct_register_custom_op = _register
    utils.torch_utils = functions
    modules = (vllm, utils, context, functions)
    return {module.__name__: module for module in modules}


def _register(name, function, fake_impl, target_lib):
    """Register an operator as vLLM's function of this name does."""
    schema = torch.library.infer_schema(function, mutates_args=[])
    target_lib.define(name + schema)
    for device in ("CPU", "CUDA"):
        target_lib.impl(name, function, dispatch_key=device)
    target_lib._register_fake(name, fake_impl)


@torch.inference_mode()
def _rows(operator, layer):
    """Return a row for each set of adapter ids."""
    (weight, *_), ids = layer.in_layout(layer.first_layout), layer.ids
    engine = ServedEngine(operator=operator.run_by_name, dtype=layer.dtype)
    stub = ServedLayer(NAME, engine=engine, weight=weight, lora=prepare_lora(layer.stack))
    context = types.SimpleNamespace(no_compile_layers={stub.name_in_graph: stub})

    def step(x, adapter_ids):
        return stub.forward(x, adapter_ids, None)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    contender = Contender("operator", "ours", lambda _: compiled(layer.x, ids), [None], lora=True)
    mode, judge = mode_of(layer.device.type, in_a_graph=False), Judge(layer)
    with mock.patch.object(operator, "get_forward_context", return_value=context):
        ready, refused = select([contender], MODES[mode], judge)
        verdicts = {"captured": refused.get(contender.name)}
        for name, others in _other_ids(layer).items() if ready else ():
            ids.copy_(others)
            y = ready[contender.name].run(0)
            verdicts[name] = judge(y, lora=True, roundings=contender.roundings)
    return [
        {"tokens": layer.tokens, "mode": mode, "ids": name, "wrong": wrong}
        for name, wrong in verdicts.items()
    ]


def _other_ids(layer):
    """Return sets of adapter ids by description, to be copied into the captured ids."""
    adapters, ids = layer.stack.adapters, layer.ids.clone()
    return {
        "every token's next adapter": (ids + 1) % adapters,
        "one adapter for all": torch.full_like(ids, adapters - 1),
        "every other token none": torch.where(
            torch.arange(len(ids), device=ids.device) % 2 == 0, -1, ids
        ),
        "none": torch.full_like(ids, -1),
    }


def _table(rows, given):
    lines = [[str(row["tokens"]), row["mode"], row["ids"], row["wrong"] or "right"] for row in rows]
    return f"vLLM is {given}.\n\n" + markdown(["M", "mode", "adapter ids", "result"], lines)
