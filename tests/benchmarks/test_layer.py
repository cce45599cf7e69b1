"""The layer benchmark: operands, the judgement of peers, reasons to skip a peer, bars and rates.

No time is measured. GPU code runs on stand-ins: operators that read the layouts that upstream
documents, and a recorder in place of CUDA graphs.
"""

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from int4_lora.compiled import layouts
from int4_lora.reference import dequantize, int4_lora_linear, pack, unpack

FORMATS = ("int4", "int8", "nvfp4", "mxfp4")
NAMES = ("ours", "ours + LoRA", "dense", "A", "B", "A + L")
CELL = {
    "rows": 4096, "columns": 1024, "tokens": 2, "format": "int4", "dtype": "bfloat16",
    "device": "cpu",
    "milliseconds": dict(zip(NAMES, (1.0, 1.2, 4.0, 2.0, 0.5, 3.0), strict=True)),
    "spread": dict.fromkeys(NAMES, 0.01), "bytes": dict.fromkeys(NAMES, 2_000_000),
    "peers": ["A", "B"], "lora_peers": ["A + L"], "lora_share": 0.03,
    "refused": {"C": "not here", "C + L": "not here"},
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def layer(module, monkeypatch):
    monkeypatch.setattr(module("operands"), "copies_beyond_the_cache", lambda *given: 3)
    return lambda tokens=5: module("operands").Layer(128, 512, tokens, torch.bfloat16, 128)


def test_every_group_spans_all_codes_and_no_copies_share_a_tensor(layer):
    made = layer()
    codes = unpack(made.weight.packed, 512).view(128, 4, 128)
    assert codes.amin(dim=2).unique().tolist() == [-8]
    assert codes.amax(dim=2).unique().tolist() == [7]
    assert torch.equal(made.dense, dequantize(made.weight))
    for layout in layouts(made.weight)[:-1]:
        values = [value for one in made.in_layout(layout) for value in vars(one).values()]
        places = [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]
        assert len(places) == len(set(places)) >= 2 * made.copies


@pytest.mark.parametrize("group_size", [512, 128])
def test_a_layer_of_bytes_is_measured_beside_the_dense_layer_alone(layer, module, group_size):
    layer()  # with few copies
    made = module("operands").Layer(128, 512, 5, torch.bfloat16, group_size, format="int8")
    codes = unpack(made.weight.packed, 512, bits=8).view(128, -1, group_size)
    assert codes.amin(dim=2).unique().tolist() == [-128]
    assert codes.amax(dim=2).unique().tolist() == [127]
    assert made.bytes_to_move(dense=False, lora=False) == (
        128 * 512 + 128 * (512 // group_size) * 2 + 5 * (512 + 128) * 2
    )
    found, refused = module("peers.peer").contenders(made, module("peers").PEERS)
    assert not found
    assert set(refused.values()) == {"int8: the peers take int4"}
    offered = [*module("contenders").our_layers(made), *module("contenders").formulations(made)]
    ready, failed = module("judgement").select(
        offered, module("modes").one_call, module("judgement").Judge(made)
    )
    operator = ["formulation int8pack"] if group_size == 512 else []
    names = ["ours", "ours + LoRA", "dense", *operator, "formulation tiles"]
    assert (list(ready), failed) == (names, {})


@pytest.mark.parametrize(
    ("format", "group_size"), [("nvfp4", 16), pytest.param("mxfp4", 32, marks=pytest.mark.nightly)]
)
def test_a_layer_of_fp4_is_measured_beside_the_dense_layer(layer, module, format, group_size):
    layer()  # with few copies
    made = module("operands").Layer(128, 512, 3, torch.bfloat16, group_size, format=format)
    assert made.dense.float().std().item() == pytest.approx(512**-0.5, rel=0.5)
    offered = [*module("contenders").our_layers(made), *module("contenders").formulations(made)]
    ready, failed = module("judgement").select(
        offered, module("modes").one_call, module("judgement").Judge(made)
    )
    names = ["ours", "ours + LoRA", "dense", "formulation gemv", "formulation tiles"]
    assert (list(ready), failed) == (names, {})


def test_options_of_a_format(module, capsys):
    options_of = module("layer").options_of
    assert [options_of(["--device", "cpu", "--format", one]).group_size for one in FORMATS] == [
        128, None, 16, 32,
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        options_of(["--device", "cpu", "--format", "mxfp4", "--group-size", "16"])
    assert "--group-size is 32 for mxfp4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options_of(["--device", "cpu", "--shapes", "64x192"])
    assert "--shapes 64x192: --group-size must divide in_features" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "active"), [(3, 3), (9, 4)])
def test_bytes_that_cannot_be_avoided(layer, tokens, active):
    made = layer(tokens)
    weight, x_and_y = 128 * 512 // 2 + 128 * 4 * 2, tokens * (512 + 128) * 2
    adapters = active * 16 * (128 + 512) * 2
    assert made.bytes_to_move(dense=False, lora=False) == weight + x_and_y
    assert made.bytes_to_move(dense=False, lora=True) == weight + x_and_y + adapters
    assert made.bytes_to_move(dense=True, lora=False) == 128 * 512 * 2 + x_and_y
    assert made.lora_share() == adapters / weight
    operations = [made.operations(lora=lora) for lora in (False, True)]
    assert operations == [2 * tokens * 128 * 512, 2 * tokens * (128 * 512 + 16 * (128 + 512))]


def test_adapters_and_ranks_can_be_other_than_the_usual(module):
    made = module("operands").Layer(128, 512, 9, torch.bfloat16, 128, adapters=6, rank=8)
    assert (made.stack.adapters, made.stack.rank, made.active_adapters) == (6, 8, 6)
    assert made.ids.tolist() == [*range(6), 0, 1, 2]
    more = made.bytes_to_move(dense=False, lora=True) - made.bytes_to_move(dense=False, lora=False)
    assert more == 6 * 8 * (128 + 512) * 2
    contenders, _ = module("peers.peer").contenders(made, module("peers.torch_int4").PEERS)
    ready, failed = module("judgement").select(
        contenders, module("modes").one_call, module("judgement").Judge(made)
    )
    assert list(ready) == ["aten int4pack", "aten int4pack + LoRA"]
    assert not failed


def test_sharers_of_copies_take_different_ones(module):
    contenders = module("contenders")
    shared = ["w0", "w1", "w2"]
    given = [contenders.Contender("A", "peer", str, one) for one in (shared, ["v"], shared)]
    turned = contenders.rotated(given)
    assert [one.weights for one in turned] == [shared, ["v"], ["w1", "w2", "w0"]]
    ready = module("modes").one_call(turned[2])
    assert [ready.run(number) for number in range(4)] == ["w1", "w2", "w0", "w1"]


def spoilt(made, y, how):
    """Return a wrong result of the layer with adapters."""
    if how == "adapter":
        return linear(made.x, made.dense)
    if how == "another adapter":
        return int4_lora_linear(made.x, made.weight, made.stack, (made.ids + 1) % 4)
    if how == "scale":
        return y + made.x[:, :128] @ made.dense[:, :128].T
    place = (slice(None), 17) if how == "output" else (2, 3)
    y[place] += torch.nan if how == "NaN" else 1
    return y


@pytest.mark.parametrize("how", ["adapter", "another adapter", "scale", "output", "+ 1", "NaN"])
def test_a_peer_with_wrong_numbers_is_named_and_not_timed(layer, module, how):
    made, judgement, contender = layer(), module("judgement"), module("contenders").Contender
    right = int4_lora_linear(made.x, made.weight, made.stack, made.ids)
    off = (right + 0.02 * right.square().mean().sqrt()).to(right.dtype)
    results = {"right": right, "off": off, "wrong": spoilt(made, right.clone(), how), "T": right.T}
    calls = {name: lambda weight, y=y: y for name, y in results.items()}
    calls["fails"] = lambda weight: linear(made.x, made.x.T)
    given = [contender(name, "peer", call, [1], True) for name, call in calls.items()]
    mode, judge = module("modes").one_call, judgement.Judge(made)
    ready, refused = judgement.select(given, mode, judge)
    assert list(ready) == ["right"]
    assert refused["off"].startswith("wrong numbers: ")
    assert refused["wrong"].startswith("wrong numbers: ")
    assert refused["T"].startswith("ValueError: the result must be torch.bfloat16 [5, 128], got")
    assert refused["fails"].startswith("RuntimeError: ")


def test_peers_are_listed_with_the_reason(layer, module):
    peer = module("peers.peer")

    def fails(layer):
        raise OSError("libcudart.so: cannot open")

    def makes(layer):
        return str, [1]

    lora, broken = (peer.Adapters("L", one, fails) for one in (lambda _: "rank 16", lambda _: None))
    absent = peer.Peer("absent", lambda layer: "not installed", fails, lora)
    others = [("broken", fails, lora), ("alone", makes, lora), ("nearly", makes, broken)]
    taken = [peer.Peer(name, lambda layer: None, make, add) for name, make, add in others]
    found, refused = peer.contenders(layer(), [absent, *taken])
    assert [one.name for one in found] == ["alone", "nearly"]
    reasons = {"absent": "not installed", "broken": "OSError: libcudart.so: cannot open"}
    both = {f"{name} + L": why for name, why in reasons.items()}
    assert refused == {**reasons, **both, "alone + L": "rank 16", "nearly + L": reasons["broken"]}


def test_what_this_machine_can_run_is_right_and_the_rest_says_why(layer, module):
    peer, judgement, made = module("peers.peer"), module("judgement"), layer()
    found, refused = peer.contenders(made, module("peers").PEERS)
    for name in ("vLLM Marlin + Punica", "vLLM Machete", "torchao plain"):
        assert refused[name].endswith("for CUDA")
    assert peer.not_importable("json", "no_such.package").startswith("no_such.package cannot be")
    ready, failed = judgement.select(found, module("modes").one_call, judgement.Judge(made))
    assert list(ready) == [one.name for one in found]
    assert not failed


def judged(module, made, y):
    """Return why a result without adapters is wrong, with the roundings that peers declare."""
    roundings = module("contenders").LOOSEST
    return module("judgement").Judge(made)(y, lora=False, roundings=roundings)


def gptq_product(x, words, scale):
    """Multiply x by GPTQ's words ``[in / 8, out]``: codes plus 8, the first in the low bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
    codes = ((words[:, None, :] >> shifts) & 15).flatten(0, 1) - 8  # [in, out]
    return (x.float() @ (codes * scale.float().repeat_interleave(128, 0))).to(x.dtype)


def in_place_of_vllm(monkeypatch, peer, order):
    """Replace vLLM's kernels by functions that keep GPTQ's layout.

    ``order`` is 2 if they take a g_idx and a column order, as until vLLM 0.29, else 0.
    """

    def marlin_gemm(a, c, b, bias, scale, *others, size_m, size_n, size_k, **flags):
        assert [c, bias, *others[:2], others[-1]] == [None, None, None, None, "uint4b8"]
        assert len(others) == 5 + order
        assert (size_m, size_n, size_k) == (5, 128, 512)
        return gptq_product(a, b, scale)

    def machete_mm(a, b_q, b_type, b_group_scales, b_group_size):
        return gptq_product(a, b_q, b_group_scales)

    ops = SimpleNamespace(marlin_gemm=marlin_gemm, machete_mm=machete_mm)
    repack = (lambda words, perm, **sizes: words) if order else (lambda words, **sizes: words)
    ops.gptq_marlin_repack = repack
    ops.machete_prepack_B = lambda words, a_type, b_type, group_scales_type: words
    scalars = SimpleNamespace(scalar_types=SimpleNamespace(uint4b8="uint4b8"))
    marlin = SimpleNamespace(
        marlin_permute_scales=lambda scale, size_k, size_n, group_size: scale,
        marlin_make_workspace_new=lambda device, blocks: None,
    )
    for name, stand_in in ((peer.OPS, ops), (peer.SCALARS, scalars), (peer.MARLIN, marlin)):
        monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.mark.parametrize("name", ["vllm_marlin", "vllm_machete"])
@pytest.mark.parametrize("order", [0, 2])
def test_vllm_kernels_get_the_weight_as_gptq_has_it(layer, module, monkeypatch, name, order):
    in_place_of_vllm(monkeypatch, module("peers.vllm_marlin"), order)
    made = layer()
    product, copies = module(f"peers.{name}").PEERS[0].make(made)
    assert len(copies) == made.copies
    y = product(copies[-1])
    assert judged(module, made, y) is None


def test_torch_kernel_gets_pairs_of_columns_and_a_table(layer, module, monkeypatch):
    def product(x, pairs, group_size, table):
        codes = torch.stack([pairs >> 4, pairs & 15], dim=2).flatten(1).to(torch.int32) - 8
        scale, zero = (table[:, :, i].T.repeat_interleave(group_size, 1).float() for i in (0, 1))
        return linear(x.float(), codes * scale + zero).to(x.dtype)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda pairs, tiles: pairs)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", product)
    made, peer = layer(), module("peers.torch_int4")
    y = peer._product(made.x, 128, peer._laid_out(made.weight))
    assert judged(module, made, y) is None


def test_zentorch_gets_codes_and_the_scales_of_groups_in_rows(layer, module, monkeypatch):
    def product(x, words, scale, zero_point, bias):
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        codes = (((words[:, None, :] >> shifts) & 15) ^ 8) - 8  # of two's complement in four bits
        dense = codes.flatten(0, 1) * scale.float().repeat_interleave(128, 0)  # [in, out]
        return (x.float() @ dense).to(x.dtype)

    def repack(codes):
        return pack(codes) ^ -0x77777778  # from codes + 8 to two's complement

    operators = SimpleNamespace(zentorch_woq_repack_weight=repack, zentorch_woq_linear=product)
    monkeypatch.setattr(torch.ops, "zentorch", operators, raising=False)
    made, peer = layer(), module("peers.zentorch_int4")
    product_of, copies = peer.PEERS[0].make(made)
    assert len(copies) == made.copies
    y = product_of(copies[-1])
    assert judged(module, made, y) is None


def test_gemlite_gets_unsigned_codes_and_one_zero(layer, module, monkeypatch):
    class Linear:
        def __init__(self, bits, *, group_size, in_features, out_features, **dtypes):
            assert (bits, group_size, in_features, out_features) == (4, 128, 512, 128)
            assert dtypes == {"input_dtype": "bf16", "output_dtype": "bf16"}

        def pack(self, codes, scales, zeros):
            assert codes.dtype == torch.uint8
            centred = codes.float() - zeros
            self.weight = centred * scales.float().repeat_interleave(128, 1)

        def __call__(self, x):
            return linear(x.float(), self.weight).to(x.dtype)

    gemlite = SimpleNamespace(GemLiteLinear=Linear, DType=SimpleNamespace(BF16="bf16"))
    monkeypatch.setitem(sys.modules, "gemlite", gemlite)
    made = layer()
    call, copies = module("peers.gemlite_int4").PEERS[0].make(made)
    y = call(copies[-1])
    assert judged(module, made, y) is None


def test_a_cuda_graph_is_warmed_up_aside_captured_once_and_replayed(module, monkeypatch):
    modes, done = module("modes"), []

    @contextlib.contextmanager
    def within(stream_or_graph, **options):
        done.append(f"into {stream_or_graph.name}")
        yield
        done.append("out")

    side = SimpleNamespace(name="side", wait_stream=lambda other: done.append("wait"))
    graph = SimpleNamespace(name="graph", replay=lambda: done.append("replay"))
    stand_ins = {"Stream": lambda: side, "current_stream": lambda: side, "stream": within}
    for name, stand_in in {**stand_ins, "CUDAGraph": lambda: graph, "graph": within}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(modes, "_laps", lambda graph: 5)
    contender = module("contenders").Contender("A", "peer", lambda w: done.append(w) or w, [1, 2])
    ready = modes.cuda_graph(contender)
    aside = ["wait", "into side", *modes.WARM_UPS * [1, 2], "out", "wait"]
    assert done == [*aside, "into graph", 1, 2, "out"]
    done.clear()
    assert (ready.layers, ready.run(0)) == (10, 2)
    assert done == ["replay"] * 5


def test_every_chain_is_compiled_however_many_there_are(module):
    modes, contender = module("modes"), module("contenders").Contender
    torch._dynamo.utils.counters.clear()
    x = torch.ones(2, 2)
    for width in range(1, 11):  # torch stops compiling at the 9th graph of a code object
        weights = [torch.ones(2, width), torch.ones(2, width)]
        ready = modes.compiled_graph(contender("A", "peer", lambda weight: x @ weight, weights))
        assert ready.layers == 2
        assert torch.equal(ready.run(0), torch.full((2, width), 2.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


def test_bars_are_against_the_best_peer(module):
    found = module("report").bars(CELL)
    assert [round(ratio, 9) for ratio in found.values()] == [2.0, 0.4, 0.25, 0.2, 200.0, 0.13]
    beside = {**CELL["milliseconds"], "ours": 3.0, "dense": 8.0}
    slowed = module("report").bars({**CELL, "beside_milliseconds": beside})
    assert slowed["slowed: ours / dense"] == pytest.approx(1.5)
    assert slowed["slowed: ours + LoRA / dense"] == pytest.approx(0.5)
    alone = {**CELL, "device": "cuda", "milliseconds": {"dense": 1.0}}
    assert list(module("report").bars(alone).values()) == [*[None] * 5, pytest.approx(0.08)]


def test_rates_and_tables(module):
    report = module("report")
    rates = report.rates(CELL, 8e9)
    assert rates["gigabytes_per_second"]["ours"] == pytest.approx(2.0)
    assert rates["share_of_copy"]["B"] == pytest.approx(0.5)
    less = {**CELL, "tokens": 4, "milliseconds": {"ours": 0.004}, "refused": {"C": "not here"}}
    lines = report.report([{**one, **report.rates(one, 8e9)} for one in (CELL, less)]).splitlines()
    assert lines[4].startswith("| 4096 x 1024 | int4 | bfloat16 | 2 | 1.000 ±1 % | 1.200 ±1 % |")
    assert lines[5].startswith("| 4096 x 1024 | int4 | bfloat16 | 4 | 0.00400 ±1 % | - |")
    assert lines[11].startswith("| 4096 x 1024 | int4 | bfloat16 | 2 | 2 (25 %) |")
    assert lines[-1] == "- not measured: C (2 of 2 rows), C + L (1 of 2 rows): not here"
