"""A served layer without an engine: adapters that are broken, absent, or added within a graph."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from int4_lora.compiled import prepare
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.integration.vllm_plugin.base_choice import VLLM, Choice, Plan
from int4_lora.integration.vllm_plugin.options import Options
from int4_lora.integration.vllm_plugin.served_engine import KERNELS, ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapter_slots, add_eagerly
from support.engines import CONFIG, WEIGHTS
from support.weights import random_weight

INPUTS, OUTPUTS, SLOTS = 256, 128, 3
RANK = 80  # of this rank, prefill is `masked` where the number of tokens is known
MOST_RANK = 16  # of vLLM's slots
A = torch.randn(SLOTS, 1, RANK, INPUTS, generator=torch.Generator().manual_seed(0)) / 16
B = torch.randn(SLOTS, 1, OUTPUTS, RANK, generator=torch.Generator().manual_seed(1))
X = torch.randn(600, INPUTS, generator=torch.Generator().manual_seed(2))
BASE = torch.randn(600, OUTPUTS, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(600) % (SLOTS + 1) - 1


def expected(ids=IDS, b=B):
    rows = [
        base if slot < 0 else base + b[slot, 0].double() @ (A[slot, 0].double() @ x)
        for slot, x, base in zip(ids.tolist(), X.double(), BASE.double(), strict=True)
    ]
    return torch.stack(rows)


def layer_with_slots():
    layer = ServedLayer("layer")
    layer.lora, (view,) = adapter_slots([A], [B])
    view.copy_(B)
    return layer


def test_adapters_within_a_graph_are_right_for_any_number_of_tokens():
    """VLLM traces once and drops the guards; later a B that is not finite is loaded."""
    layer = layer_with_slots()
    kept = torch.compile(
        layer.add_adapters,
        backend="eager",
        fullgraph=True,
        options={"guard_filter_fn": lambda guards: [False] * len(guards)},
    )
    for tokens in (600, 1, 7):
        rows = [operand[:tokens].clone() for operand in (BASE, X, IDS)]
        for operand in rows:
            torch._dynamo.mark_dynamic(operand, 0)
        y = kept(*rows)
        torch.testing.assert_close(y.double(), expected()[:tokens], rtol=1e-5, atol=1e-4)
    layer.lora.slices[0].bt[1].fill_(torch.nan)
    y = kept(BASE.clone(), X.clone(), IDS.clone())
    assert y[IDS == 1].isnan().all()
    others = IDS != 1
    torch.testing.assert_close(y[others].double(), expected()[others], rtol=1e-5, atol=1e-4)


def test_adapters_by_the_reference():
    y = add_eagerly(BASE, X, IDS, [A], [B])
    torch.testing.assert_close(y.double(), expected(), rtol=1e-5, atol=1e-4)
    ids = torch.where(IDS == 2, 99, IDS)  # no slot
    torch.testing.assert_close(
        add_eagerly(BASE, X, ids, [A], [B])[IDS == 2], BASE[IDS == 2], rtol=0, atol=0
    )


@pytest.mark.parametrize("none", [True, False])
def test_on_a_gpu_vllms_flag_tells_whether_a_step_has_adapters(none):
    """Shown with tensors of the meta device, since no GPU is needed to read the flag."""
    layer = ServedLayer("layer")
    ids = IDS.to("meta")
    assert not layer._none_active(ids)
    meta = SimpleNamespace(no_lora_flag_cpu=torch.tensor([none]))
    layer.operators = SimpleNamespace(token_mapping_meta=meta)
    assert layer._none_active(ids) == none


def test_layers_of_a_shape_are_one_graph_of_vllms():
    """Their names are inputs of the graph: written into it, each layer would have its own."""
    from int4_lora.integration.vllm_plugin.layer_operator import run_by_name

    codes = []

    def backend(graph, _):
        codes.append(graph.code)
        return lambda *_: (torch.zeros(3, 32),)

    for name in ("layers.0.up_proj", "layers.1.up_proj"):
        torch.compiler.reset()
        layer = ServedLayer(name, ServedEngine())
        layer.weight = prepare(random_weight(rows=32, columns=64))
        call = lambda x, layer=layer: run_by_name(layer, x, None, None)  # noqa: E731
        torch.compile(call, backend=backend, fullgraph=True)(torch.zeros(3, 64))
    torch.compiler.reset()
    assert codes[0] == codes[1]
    assert "layers.0" not in codes[0]


def test_the_key_of_vllms_compile_cache_knows_which_kernels_run():
    from vllm.config import VllmConfig

    def key(weight, lora_fallback_reason=None, plan=None):
        config = VllmConfig()
        engine = ServedEngine(model="m", additional_config=config.additional_config)
        layer = ServedLayer("a.b", engine, int4=True, weight=weight)
        layer.lora_fallback_reason = lora_fallback_reason
        if plan is not None:
            layer.choice, layer.shared = Choice(plan), object()
        engine.layers.append(layer)
        engine.weight_loaded(layer)
        assert set(config.additional_config) == {KERNELS}
        return config.compute_hash()

    keys = [
        key(None),
        key(object()),
        key(object(), "not right"),
        key(object(), plan=Plan(adapters=VLLM)),
        key(None, plan=Plan(VLLM, ours_from=25)),
        key(None, plan=Plan(VLLM, ours_from=33)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(None) == key(None)


def test_on_a_gpu_the_log_says_experimental_whichever_kernels_run():
    engine = ServedEngine(device="cuda")
    engine.layers.append(ServedLayer("a", engine, int4=True, fallback_reason="measured"))
    assert "experimental" in engine.summary()[1]
    engine.device = "cpu"
    assert len(engine.summary()) == 1


def test_the_log_counts_how_layers_run():
    engine = ServedEngine()
    for reason, lora_reason in (
        (None, None),
        ("measured 1.12 x faster", None),
        ("measured 1.12 x faster", "not right: 3 bounds away"),
        ("no INT4 weights", None),
    ):
        layer = ServedLayer("a", engine, int4=True, fallback_reason=reason)
        layer.weight = object() if reason is None else None
        layer.lora_fallback_reason = lora_reason
        engine.layers.append(layer)
    assert engine.summary() == [
        "1 of 4 linear layers fused (INT4 base, adapters); 3 on vLLM's base kernel: 2 measured "
        "1.12 x faster; 1 no INT4 weights; 1 with plain, slow LoRA: 1 not right: 3 bounds away"
    ]


@pytest.mark.parametrize(("warm_up", "tokens"), [(True, [1, 3, 26]), (False, [1])])
def test_without_warm_up_a_single_token_is_checked(warm_up, tokens):
    engine, checked = ServedEngine(Options(warm_up=warm_up), max_tokens=512), []
    for name in ("a", "b"):  # of one kind: the second is not checked
        engine.fault_of_kind("kind", name, bucket_of, checked.append)
    assert checked == tokens


@pytest.mark.parametrize("ngram", [True, False])
def test_a_draft_model_has_no_adapters(ngram):
    """So its summary is logged after its last weight, not after LoRA layers that never come."""
    from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata

    target, draft = (
        SimpleNamespace(model=name, dtype=torch.bfloat16, enable_sleep_mode=False)
        for name in ("target", "draft")
    )
    config = SimpleNamespace(
        additional_config={},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        device_config=SimpleNamespace(device_type="cpu"),
        compilation_config=SimpleNamespace(static_forward_context={}, mode=0),
        lora_config=SimpleNamespace(fully_sharded_loras=False, max_loras=2, max_lora_rank=8),
        speculative_config=SimpleNamespace(
            target_model_config=target, draft_model_config=target if ngram else draft
        ),
    )
    for config.model_config in (target, draft):
        engine = ServedEngine.from_vllm(config, LoRAMetadata(), {})
        assert engine.lora_enabled == (ngram or config.model_config is target)


@pytest.mark.parametrize(
    ("said", "packed", "compatible"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_the_configuration_says_what_the_checkpoint_says(said, packed, compatible):
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata

    config = Int4LoRAConfig.from_config(CONFIG)
    assert config.is_lora_compatible()  # it has a group of INT4 weights
    config.metadata = LoRAMetadata(said, ("q_proj",))
    config._engine = ServedEngine()
    config._engine.layers.append(ServedLayer("a", config._engine, packed=packed))
    assert config.is_lora_compatible() == compatible
    assert config.lora_compatible == said
    assert config.lora_target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("weights", "group", "compatible"),
    [
        ({"num_bits": 8}, {}, True),
        ({"num_bits": 8, "type": "float"}, {}, False),
        ({"num_bits": 8}, {"input_activations": {"num_bits": 8, "type": "int"}}, False),
    ],
)
def test_a_config_is_compatible_by_its_groups(weights, group, compatible):
    """Before layers are built; W8A16 is packed, FP8 and W8A8 are not."""
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig

    made = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}, **group}
    config = Int4LoRAConfig.from_config({**CONFIG, "config_groups": {"group_0": made}})
    assert config.is_lora_compatible() == compatible


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_config_of_awq_or_gptq_is_compatible(method):
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from support.other_checkpoints import CONFIGS

    assert Int4LoRAConfig.from_config(CONFIGS[method]).is_lora_compatible()


@pytest.fixture
def wrapped(one_rank, monkeypatch):
    """Return a function that makes one of our LoRA layers; its check finds a given fault."""
    from vllm.config.lora import LoRAConfig
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    from int4_lora.integration.vllm_plugin import lora_layers
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig

    def make(fault=None, choice=None, ignore=(), prefix=""):
        monkeypatch.setattr(ServedLayer, "adapters_fault", lambda *_: fault)
        config = Int4LoRAConfig.from_config({**CONFIG, "ignore": list(ignore)})
        config._engine = ServedEngine(Options(backend="compiled", warm_up=False))
        base = ColumnParallelLinear(
            INPUTS,
            OUTPUTS,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix=prefix,
        )
        base.int4_lora.choice = choice
        (ours,) = [
            cls for cls in lora_layers.LAYERS if cls.__name__ == "Int4ColumnParallelLinearWithLoRA"
        ]
        layer = ours(base)
        settings = LoRAConfig(max_lora_rank=MOST_RANK, max_loras=SLOTS, max_cpu_loras=SLOTS)
        settings.lora_dtype = torch.bfloat16
        layer.create_lora_weights(SLOTS, settings, None)
        return layer

    return make


def test_a_layer_that_fails_the_check_keeps_vllms_layout(wrapped):
    """VLLM's operators for GPUs assert that B is contiguous."""
    assert not wrapped().lora_b_stacked[0].is_contiguous()
    failed = wrapped("wrong by 3")
    assert failed.lora_b_stacked[0].is_contiguous()
    assert failed.served.lora is None
    failed.set_lora(
        1, torch.ones(MOST_RANK, INPUTS).bfloat16(), torch.ones(OUTPUTS, MOST_RANK).bfloat16()
    )
    assert failed.lora_b_stacked[0][1].eq(1).all()


def test_a_layer_with_vllms_adapters_keeps_its_layout_and_calls_its_operators(wrapped, monkeypatch):
    layer = wrapped(choice=Choice(Plan(adapters=VLLM)))
    assert layer.lora_b_stacked[0].is_contiguous()
    assert layer.served.lora is None
    calls = []

    class Operators:
        def __getattr__(self, name):
            return lambda *operands, **_: calls.append((name, operands[0], operands[3]))

    layer.punica_wrapper = Operators()
    layer.set_lora(
        1, torch.ones(MOST_RANK, INPUTS).bfloat16(), torch.ones(OUTPUTS, MOST_RANK).bfloat16()
    )
    monkeypatch.setattr(layer.base_layer.quant_method, "apply", lambda *_: BASE.bfloat16())
    y = layer.apply(X.bfloat16())
    ((name, base, b),) = calls
    assert name == "add_lora_linear"
    assert base.data_ptr() == y.data_ptr()
    assert b[0] is layer.lora_b_stacked[0]
    assert b[0][1].eq(1).all()


class Traffic(TorchDispatchMode):
    """Counts the elements of slots and adapters that operators read and write.

    Args:
        storages: the name of each storage to watch, by its address.
    """

    def __init__(self, storages):
        super().__init__()
        self.storages, self.read, self.written = storages, Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if isinstance(given, torch.Tensor):
                self._note(function, argument, given)
        return function(*args, **(kwargs or {}))

    def _note(self, function, argument, given):
        name = self.storages.get(given.untyped_storage().data_ptr())
        if name is None or function.is_view:
            return
        written = argument.alias_info is not None and argument.alias_info.is_write
        (self.written if written else self.read)[name] += given.numel()


def adapter_of(rank, value=1.0):
    return tuple(torch.full(shape, value).bfloat16() for shape in ((rank, INPUTS), (OUTPUTS, rank)))


def test_activating_an_adapter_costs_one_copy_of_it(wrapped):
    """In elements: each of the adapter's is read once, and no more of the slot is written."""
    layer = wrapped()
    (slice_,) = layer.served.lora.slices
    a, b = adapter_of(4)
    layer.set_lora(0, *adapter_of(MOST_RANK))
    layer.set_lora(1, a, b)  # also looks for NaN in B
    layer.set_lora(1, *adapter_of(2))
    names = {"a": a, "b": b, "slots of a": slice_.a, "slots of b": slice_.bt}
    watched = {tensor.untyped_storage().data_ptr(): name for name, tensor in names.items()}
    with Traffic(watched) as traffic:
        layer.set_lora(1, a, b)
    assert traffic.read == {"a": a.numel(), "b": b.numel()}
    assert traffic.written == {  # the adapter, and the ranks of the one before it are emptied
        "slots of a": 4 * INPUTS + 2 * INPUTS,
        "slots of b": 4 * OUTPUTS + 2 * OUTPUTS,
    }
    assert slice_.a[:, :, 0].tolist() == [[1.0] * 16, [1.0] * 4 + [0.0] * 12, [0.0] * 16]
    assert slice_.bt[:, :, 0].tolist() == slice_.a[:, :, 0].tolist()


def test_a_slot_is_empty_beyond_its_adapter(wrapped):
    layer = wrapped()
    (slice_,) = layer.served.lora.slices
    ranks = layer.served.slot_ranks
    for rank in (16, 3, 9, 0):
        if rank:
            layer.set_lora(1, *adapter_of(rank))
        else:
            layer.reset_lora(1)
        assert ranks.rank(1) == rank
        for slots in (slice_.a, slice_.bt):
            assert slots[1, :rank].eq(1).all()
            assert not slots[1, rank:].any()
            assert not slots[[0, 2]].any()


def test_a_slot_that_could_not_be_filled_is_emptied_before_its_next_adapter(wrapped):
    layer = wrapped()
    (slice_,) = layer.served.lora.slices
    a, _ = adapter_of(16)
    with pytest.raises(RuntimeError):
        layer.set_lora(1, a, torch.ones(OUTPUTS + 1, 16).bfloat16())  # A is there, B does not fit
    assert slice_.a[1].any()
    layer.set_lora(1, *adapter_of(2))
    assert not slice_.a[1, 2:].any()


def test_filling_a_slot_looks_at_its_adapter_alone(wrapped, monkeypatch):
    layer = wrapped()
    (slice_,) = layer.served.lora.slices
    a, good = adapter_of(MOST_RANK)
    spoilt = good.clone()
    spoilt[3, 2] = torch.inf
    looked_at, aminmax = [], torch.Tensor.aminmax

    def look(tensor):
        looked_at.append(tensor.numel())
        return aminmax(tensor)

    monkeypatch.setattr(torch.Tensor, "aminmax", look)
    for slot, b, finite in ((0, good, True), (1, spoilt, False), (0, good, False)):
        layer.set_lora(slot, a, b)
        assert slice_.finite == finite
    layer.set_lora(2, a, spoilt)
    layer.reset_lora(1)
    assert not slice_.finite
    layer.set_lora(2, a, good)
    assert slice_.finite
    assert looked_at == [OUTPUTS * MOST_RANK] * 2  # each B once, however often it is activated
    # finite in float32, infinite in the slots
    layer.set_lora(1, a, torch.full((OUTPUTS, MOST_RANK), 3.4e38))
    assert not slice_.finite


@pytest.mark.parametrize("rank", [12, 5, MOST_RANK])
def test_an_adapter_of_a_smaller_rank_is_padded(wrapped, rank):
    """VLLM's list of ranks is for the slots; a slot's other rows stay zero, whatever was there."""
    layer = wrapped()
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, INPUTS, generator=generator).bfloat16() / 16
    b = torch.randn(OUTPUTS, rank, generator=generator).bfloat16()
    full = torch.ones(MOST_RANK, INPUTS).bfloat16(), torch.ones(OUTPUTS, MOST_RANK).bfloat16()
    layer.set_lora(1, *full)
    layer.set_lora(1, a, b)
    x, base, ids = X[:6].bfloat16(), BASE[:6].bfloat16(), torch.tensor([1, -1, 1, 0, 1, -1])
    y = layer.served.add_adapters(base, x, ids)
    right = base.double() + (ids == 1)[:, None] * (x.double() @ a.double().T @ b.double().T)
    torch.testing.assert_close(y.double(), right, rtol=2**-7, atol=2**-6)


def test_scales_of_two_dtypes_are_left_to_vllm(one_rank, monkeypatch):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig

    config = Int4LoRAConfig.from_config(CONFIG)
    config._engine = ServedEngine(Options(backend="compiled", warm_up=False))
    layer = MergedColumnParallelLinear(
        INPUTS, [OUTPUTS] * 2, bias=False, params_dtype=torch.bfloat16, quant_config=config
    )
    layer.weight_packed.data.zero_()
    for part, dtype in enumerate((torch.bfloat16, torch.float16)):
        scale = torch.ones(OUTPUTS, INPUTS // 128, dtype=dtype)
        layer.weight_scale.weight_loader(layer.weight_scale, scale, part)
    layer.scheme.process_weights_after_loading(layer)
    assert layer.int4_lora.weight is None
    reason = layer.int4_lora.fallback_reason
    assert reason == "merged of scales in ['torch.bfloat16', 'torch.float16']"


def test_layers_that_are_not_quantised_have_our_adapters(one_rank, wrapped):
    layer = wrapped(ignore=["model.dense"], prefix="model.dense")
    linear = layer.base_layer
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    linear.quant_method.process_weights_after_loading(linear)
    layer.served.operators = layer.punica_wrapper = SimpleNamespace(
        _token_lora_indices=torch.tensor([1, -1, 7])
    )
    a = torch.ones(2, INPUTS).bfloat16() / 64
    b = torch.arange(OUTPUTS * 2).view(OUTPUTS, 2).bfloat16() / 64
    layer.set_lora(1, a, b)
    x = X[:2].bfloat16()
    y = layer.apply(x)
    base = linear.quant_method.apply(linear, x, None)
    assert layer.served.fallback_reason == "no INT4 weights"
    assert torch.equal(y[1], base[1])
    right = base[0].double() + b.double() @ (a.double() @ x[0].double())
    torch.testing.assert_close(y[0].double(), right, rtol=2**-7, atol=2**-6)


def test_columns_in_an_activation_order_are_not_split(one_rank):
    from int4_lora.integration.vllm_plugin.scheme import Int4Scheme
    from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
    from int4_lora.integration.vllm_plugin.stock_trial import CompressedTensorsWNA16

    stock = CompressedTensorsWNA16("group", 4, 32)
    scheme = Int4Scheme(stock, ServedLayer("a.down_proj"), ordered=True)
    with pytest.raises(ValueError, match=r"a\.down_proj has an activation order, and tensor"):
        scheme.create_weights(
            torch.nn.Module(), 64, 128, [64], 64, torch.bfloat16, weight_loader=None
        )
