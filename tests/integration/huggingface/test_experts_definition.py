"""int4_moe against transformers' eager experts, and PEFT's adapters on them, in float64."""

from importlib.metadata import version

import peft
import pytest
import torch
from packaging.version import Version

from int4_lora.integration import read_adapter
from int4_lora.reference import (
    ExpertsLoRA,
    ExpertsWeight,
    LoRAStack,
    dequantize,
    int4_moe,
    quantize,
)
from support.trained import WITH_TODAYS_PEFT, qwen3_moe, trained

FUSES_EXPERTS = Version(version("transformers")) >= Version("5")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
NEAR = 1e-9  # of the largest result
TOKENS = 24


def packed_experts(module, **arguments):
    """Return INT4 weights of transformers' experts, which become the dequantised ones."""
    packed = {}
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(module, name)
        packed[name] = [
            quantize(weight.float(), **{"group_size": 32, "symmetric": False, **arguments})
            for weight in parameter.detach()
        ]
        dense = torch.stack([dequantize(weight, parameter.dtype) for weight in packed[name]])
        parameter.data.copy_(dense)
    return ExpertsWeight(packed["gate_up_proj"], packed["down_proj"])


def assert_near(y, expected):
    assert y.dtype == expected.dtype == torch.float64
    assert (y - expected).abs().max() <= NEAR * expected.abs().max()


def blocks():
    """Return a block of each family in float64, with its activation, as transformers makes it."""
    import transformers.models.mixtral.modeling_mixtral as mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3

    config = {"hidden_size": 64, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return {
        "Qwen3-MoE": lambda act: qwen3.Qwen3MoeSparseMoeBlock(
            qwen3.Qwen3MoeConfig(**config, moe_intermediate_size=32, num_experts=8, hidden_act=act)
        ),
        "Mixtral": lambda act: mixtral.MixtralSparseMoeBlock(
            mixtral.MixtralConfig(
                **config, intermediate_size=96, num_local_experts=4, hidden_act=act
            )
        ),
    }


@pytest.mark.versions
@pytest.mark.skipif(not FUSES_EXPERTS, reason="transformers 4 keeps experts as linears")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral"])
def test_transformers_eager_experts(family, activation):
    act = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = blocks()[family](act).double()
        for parameter in block.parameters():
            parameter.data.normal_(std=0.2)
        x = torch.randn(TOKENS, 64, dtype=torch.float64)
    experts = packed_experts(block.experts)
    with torch.no_grad():
        _, weights, ids = block.gate(x)
        expected = block.experts(x, ids, weights)
        assert torch.equal(block(x[None])[0], expected)
    assert len(ids.unique()) == experts.count
    assert_near(int4_moe(x, experts, ids, weights, activation=activation), expected)


def experts_lora(adapters, prefix, count):
    """Return the adapters of one layer's experts, as read from the files that PEFT wrote."""

    def stacks(name):
        return [
            LoRAStack.stack(
                [
                    (module.a, module.b, module.scaling)
                    for adapter in adapters
                    for module in [adapter.modules[f"{prefix}.{expert}.{name}"]]
                ]
            )
            for expert in range(count)
        ]

    return ExpertsLoRA(stacks("gate_up_proj"), stacks("down_proj"))


class TestAdaptersOfPeft:
    """A batch of which each token has another adapter equals PEFT's model with that adapter."""

    pytestmark = WITH_TODAYS_PEFT

    def test_target_parameters(self, tmp_path):
        model = qwen3_moe(experts_implementation="eager")
        experts = packed_experts(model.model.layers[0].mlp.experts)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for folder, rank in (("first", 4), ("second", 3)):
            model = qwen3_moe(experts_implementation="eager")
            model.load_state_dict(state)
            settings = {"target_parameters": [GATE_UP, DOWN], "target_modules": [], "r": rank}
            trained(model, tmp_path / folder, **settings)
        folders = [tmp_path / "first", tmp_path / "second"]
        adapters = [read_adapter(folder) for folder in folders]
        lora = experts_lora(adapters, "model.layers.0.mlp.experts", experts.count)

        x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(3)).double()
        adapter_ids = torch.arange(TOKENS) % 3 - 1
        expected = torch.zeros_like(x)
        for adapter, folder in ((-1, None), *enumerate(folders)):
            base = qwen3_moe(experts_implementation="eager")
            base.load_state_dict(state)
            if folder is not None:
                base = peft.PeftModel.from_pretrained(base, folder).base_model.model
            block = base.double().model.layers[0].mlp
            chosen = adapter_ids == adapter
            with torch.no_grad():
                _, weights, ids = block.gate(x)
                expected[chosen] = block(x[None])[0][chosen]
        y = int4_moe(x, experts, ids, weights, lora, adapter_ids)
        assert_near(y, expected)
        base = int4_moe(x, experts, ids, weights)
        assert ((y - base).abs().amax(dim=1) > 1e-3)[adapter_ids >= 0].all()
