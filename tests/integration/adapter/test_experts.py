"""Pairs of parameters: read as PEFT applies them, refused where there are two readings."""

import pytest
import torch

from int4_lora.integration import read_adapter
from support.trained import WITH_TODAYS_PEFT, edit, qwen3_moe, trained

pytestmark = WITH_TODAYS_PEFT

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def deltas(adapter):
    return {
        name: module.scaling * (module.b.double() @ module.a.double())
        for name, module in adapter.modules.items()
    }


def theirs(before, merged):
    """Return what PEFT added to each weight; experts by their number."""
    found = {}
    for name, weight in merged.state_dict().items():
        delta = weight.double() - before[name].double()
        if not delta.any():
            continue
        owner, _, leaf = name.rpartition(".")
        if delta.ndim == 3:
            found |= {f"{owner}.{number}.{leaf}": one for number, one in enumerate(delta)}
        else:
            found[owner] = delta
    return found


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, delta in ours.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": [GATE_UP, DOWN], "target_modules": []},
        {"target_parameters": [DOWN], "target_modules": ["q_proj"]},
        {"target_parameters": [GATE_UP], "target_modules": [], "use_rslora": True},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_parameters": [GATE_UP, DOWN], "target_modules": [],
         "rank_pattern": {"gate_up_proj": 2, r"layers\.1\.mlp\.experts\.down_proj": 5},
         "alpha_pattern": {"experts.down_proj": 3}},
    ],
    ids=["both", "down", "gate_up", "older-names", "all-linear", "patterns"],
)  # fmt: skip
def test_pairs_are_those_that_peft_adds(tmp_path, settings):
    model = qwen3_moe()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = trained(model, tmp_path, **settings).merge_and_unload()
    assert_same(deltas(read_adapter(tmp_path)), theirs(before, merged))


def test_the_order_of_the_two_pairs_follows_from_their_shapes(tmp_path):
    trained(qwen3_moe(), tmp_path, target_parameters=[GATE_UP, DOWN], target_modules=[])
    right = deltas(read_adapter(tmp_path))

    def other_order(tensors):  # as a model would give that declares down_proj first
        for key in [key for key in tensors if ".experts.lora_" in key]:
            inner = key.replace(".experts.", ".experts.base_layer.")
            tensors[key], tensors[inner] = tensors[inner], tensors[key]

    edit(tmp_path, other_order)
    assert_same(deltas(read_adapter(tmp_path)), right)


def test_both_pairs_as_peft_before_0_19_wrote_them(tmp_path):
    model = qwen3_moe()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.is_transposed = True  # then PEFT takes out for in, as it always did before
    settings = {"target_parameters": [GATE_UP, DOWN], "target_modules": [], "steps": 0}
    merged = trained(model, tmp_path, **settings).merge_and_unload()
    ours = read_adapter(tmp_path)
    assert ours.modules["model.layers.0.mlp.experts.2.gate_up_proj"].a.shape == (4, 64)
    assert_same(deltas(ours), theirs(before, merged))


def test_a_single_square_pair_of_an_older_peft_has_two_readings(tmp_path):
    square = {"hidden_size": 64, "moe_intermediate_size": 64}
    trained(qwen3_moe(**square), tmp_path, target_parameters=[DOWN], target_modules=[])
    assert len(read_adapter(tmp_path).modules) == 2 * 3
    for version in ("0.18.1", None):
        edit(tmp_path, peft_version=version)
        with pytest.raises(ValueError, match=r"PEFT before 0\.19 wrote lora_A of down_proj for"):
            read_adapter(tmp_path)
    edit(tmp_path, peft_version="1.0")
    assert len(read_adapter(tmp_path).modules) == 2 * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_parameters": [DOWN]}, r"holds pairs of 2 of its .* names \['down_proj'\]"),
        ({"target_parameters": None}, "holds pairs of 2 of its parameters.* names none"),
        ({"target_parameters": [DOWN, "experts.up_proj"]},
         r"names \['down_proj', 'up_proj'\], and nothing says which pair is of which"),
        ({"r": 5}, r"lora_A of gate_up_proj must be \[experts \* 5, in\]"),
        ({"rank_pattern": {"gate_up_proj": 12}},
         "its parameters have different experts: {'gate_up_proj': 1, 'down_proj': 3}"),
        ({"target_parameters": DOWN}, "target_parameters must be strings, got 'mlp.experts.down"),
    ],
)  # fmt: skip
def test_refused(tmp_path, config, message):
    trained(qwen3_moe(), tmp_path, target_parameters=[GATE_UP, DOWN], target_modules=[], steps=0)
    edit(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_one_pair_for_two_parameters_is_refused(tmp_path):
    trained(qwen3_moe(), tmp_path, target_parameters=[DOWN], target_modules=[], steps=0)
    edit(tmp_path, target_parameters=[DOWN, GATE_UP])
    message = r"holds pairs of 1 of its parameters, .* names \['down_proj', 'gate_up_proj'\]"
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_shapes_that_fit_neither_order_are_refused(tmp_path):
    trained(qwen3_moe(), tmp_path, target_parameters=[GATE_UP, DOWN], target_modules=[], steps=0)
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: torch.zeros(12, 40)}))
    message = (
        r"of gate_up_proj \[2 \* inter, hidden\] and down_proj .*got \[64, 64\] and \[64, 40\]"
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_a_missing_matrix_is_named(tmp_path):
    trained(qwen3_moe(), tmp_path, target_parameters=[GATE_UP, DOWN], target_modules=[], steps=0)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    edit(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: lora_B is missing"):
        read_adapter(tmp_path)
