"""Graphs that are kept on disk, loaded before any is traced, and checked."""

import dataclasses
import logging
import pickle

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.compiled.graphs import cache
from int4_lora.integration.vllm_plugin import kept_graphs
from int4_lora.integration.vllm_plugin.kept_graphs import KeptGraphs, can_keep_graphs
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapter_slots
from int4_lora.reference import quantize

pytestmark = [
    pytest.mark.skipif(not can_keep_graphs(), reason="torch cannot make bytes of a graph"),
    pytest.mark.versions,
]

RANK = 8
WEIGHT = quantize(
    torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), group_size=32
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_graphs", {})


def started():
    """Return a layer of an engine that has started; each start is as in a process of its own."""
    cache._graphs.clear()
    engine = ServedEngine(max_tokens=1, kept=KeptGraphs("a model"))
    loaded = engine.kept.load()
    layer = ServedLayer("a.down_proj", engine, weight=prepare(WEIGHT))
    a, b = torch.zeros(2, 1, RANK, 64).bfloat16(), torch.zeros(2, 1, 32, RANK).bfloat16()
    layer.lora, _ = adapter_slots([a], [b])
    assert layer.adapters_fault(layer.lora, None) is None
    return layer, loaded


@pytest.fixture
def compilations(monkeypatch):
    """Return a list that gets the key of each graph that is compiled."""
    keys, compile_graph = [], cache.compile_graph

    def counted(key, *others):
        keys.append(key)
        return compile_graph(key, *others)

    monkeypatch.setattr("int4_lora.compiled.graphs.entry.compile_graph", counted)
    return keys


def test_a_second_start_traces_nothing_and_a_spoilt_file_is_found_out(
    compilations, monkeypatch, caplog
):
    layer, loaded = started()
    assert (loaded, len(compilations)) == (0, 1)
    layer, loaded = started()
    assert (loaded, len(compilations)) == (1, 1)
    file = layer.engine.kept.file

    # a graph that is wrong: discarded, and compiled again
    right = kept_graphs._function_of
    monkeypatch.setattr(
        kept_graphs,
        "_function_of",
        lambda content: lambda *inputs: [right(content)(*inputs)[0] * 1.1],
    )
    with caplog.at_level(logging.WARNING, logger="vllm.int4_lora"):
        layer, loaded = started()
    assert (loaded, len(compilations)) == (1, 2)
    assert "graphs on disk are wrong, and compiled again" in caplog.text
    monkeypatch.setattr(kept_graphs, "_function_of", right)
    assert file.exists()  # with the graph that is right
    assert started()[1] == 1

    # of another machine, and damaged
    whole = file.read_bytes()
    kept = pickle.loads(whole)
    file.write_bytes(pickle.dumps({**kept, "key": {**kept["key"], "instructions": "other"}}))
    assert KeptGraphs("a model").load() == 0
    file.write_bytes(whole[:1000])
    assert KeptGraphs("a model").load() == 0
    assert len(compilations) == 2


def test_what_graphs_depend_on_tells_files_apart(monkeypatch):
    files = {KeptGraphs("a model").file, KeptGraphs("another").file}
    monkeypatch.setattr(kept_graphs, "_digest_of_sources", lambda: "changed")
    files.add(KeptGraphs("a model").file)
    monkeypatch.setattr(kept_graphs, "_instructions", lambda: "AVX2")
    files.add(KeptGraphs("a model").file)
    assert len(files) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    kept = KeptGraphs("a model")
    (tmp_path / "graphs").write_text("a file")
    monkeypatch.setattr(kept_graphs, "_bytes_of", lambda function: b"")
    cache._graphs["key"] = cache.Graph(None, dataclasses.make_dataclass("F", ["serialize"])(1))
    assert not kept.keep()
    assert kept.load() == 0
