"""The table of PEFT's options and initialisations, held against the installed PEFT.

Three kinds of tests: PEFT has no option and no initialisation that the table lacks; each
initialisation leaves the base alone, or changes it, as the table says; what is called plain has
PEFT's own output when it is merged.
"""

import ast
import dataclasses
import inspect
import json
import pathlib
import textwrap
import typing

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from int4_lora.integration import read_adapter
from int4_lora.integration.adapter.peft_table import (
    CHANGES_THE_BASE,
    PLAIN,
    READ,
    REFUSED,
    UNUSED,
    check_initialisation,
    check_options,
)
from support.initialisations import INPUT, Layers, start, train

pytestmark = pytest.mark.versions

FOLDER = pathlib.Path(inspect.getfile(peft)).parent / "tuners" / "lora"


def is_known(way):
    return way in PLAIN or any(way.startswith(start) for start in CHANGES_THE_BASE)


def compared_ways():
    """Return every string that PEFT's LoRA compares init_lora_weights with."""
    found = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                subject, others = node.left, node.comparators
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".startswith"):
                subject, others = node.func, node.args
            else:
                continue
            if "init_lora_weights" in ast.unparse(subject):
                found |= {other.value for other in others if isinstance(other, ast.Constant)}
    return {value for value in found if isinstance(value, str)}


def initialisers():
    """Return the methods of LoraLayer that start an adapter, by the way's name."""
    return {
        name.removesuffix("_init"): textwrap.dedent(inspect.getsource(method))
        for name, method in inspect.getmembers(LoraLayer, inspect.isfunction)
        if name.endswith("_init") and not name.startswith("_")
    }


def declared_ways():
    """Return the strings that the type of init_lora_weights lists."""
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    return {
        value
        for part in typing.get_args(hint)
        for value in typing.get_args(part)
        if isinstance(value, str)
    }


def test_every_initialisation_of_peft_is_in_the_table():
    assert {"pissa", "olora", "eva", "loftq", "gaussian"} <= compared_ways()
    assert {"pissa", "olora", "corda", "loftq"} <= initialisers().keys()
    assert "pissa_niter_[number of iters]" in declared_ways()
    (field,) = (
        field for field in dataclasses.fields(peft.LoraConfig) if field.name == "init_lora_weights"
    )
    variants = set(field.metadata.get("lora_variants", ()))
    peft_has = compared_ways() | initialisers().keys() | declared_ways() | variants
    assert {way for way in peft_has if not is_known(way)} == set()


def test_every_option_of_peft_is_in_one_group():
    groups = [READ, UNUSED, REFUSED.keys()]
    assert sum(map(len, groups)) == len(frozenset().union(*groups))
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert options - frozenset().union(*groups) == set()


def test_the_default_config_passes():
    config = json.loads(json.dumps(peft.LoraConfig(target_modules="q").to_dict()))
    check_options("file", config)
    check_initialisation("file", config)


def test_an_initialiser_that_assigns_the_bases_weight_changes_the_base():
    assigns = {
        way
        for way, source in initialisers().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if ast.unparse(target) in ("self.get_base_layer().weight.data", "base_layer.weight.data")
    }
    assert assigns == initialisers().keys() & CHANGES_THE_BASE.keys()


def started(way):
    if isinstance(way, str) and way.split("_niter")[0] not in compared_ways():
        pytest.skip(f"this PEFT has no {way}")
    return start(way)


def base_weights(adapted):
    return [layer.get_base_layer().weight for layer in adapted.base_model.model.layers]


@pytest.mark.parametrize("way", [True, False, *sorted(PLAIN)])
def test_a_plain_initialisation_has_pefts_output_when_merged(way, tmp_path):
    adapted = started(way)
    model = Layers()
    for base, layer in zip(base_weights(adapted), model.layers, strict=True):
        assert torch.equal(base, layer.weight)
    if way is not False:  # whose B is random
        torch.testing.assert_close(adapted(INPUT), model(INPUT), rtol=0, atol=1e-6)
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.modules.keys() == {"layers.0", "layers.1"}
    before = model(INPUT).detach()
    for name, module in adapter.modules.items():
        delta = module.scaling * (module.b.double() @ module.a.double())
        layer = model.get_submodule(name)
        layer.weight.data = (layer.weight.double() + delta).float()
    assert (model(INPUT) - before).abs().max() > 1e-2
    torch.testing.assert_close(model(INPUT), adapted(INPUT), rtol=1e-5, atol=1e-6)


# LoftQ cannot be started without bitsandbytes; the test of assignments covers it.
@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_what_the_table_says_changes_the_base_does(way, tmp_path):
    adapted = started(way)
    for base, layer in zip(base_weights(adapted), Layers().layers, strict=True):
        assert (base - layer.weight).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"{way}' changes the base's weights at its start"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of mixed initialisations
@pytest.mark.parametrize("way", [way for way in CHANGES_THE_BASE if way != "loftq"])
def test_pefts_way_out_gives_an_adapter_of_the_unchanged_base(way, tmp_path):
    adapted = started(way)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "before")
    adapted.peft_config["default"].init_lora_weights = way
    train(adapted)
    adapted.save_pretrained(
        tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before")
    )
    want, model = adapted(INPUT), Layers()
    for name, module in read_adapter(tmp_path / "after").modules.items():
        model.get_submodule(name).weight.data += module.scaling * (module.b @ module.a)
    torch.testing.assert_close(model(INPUT), want, rtol=1e-4, atol=1e-5)


def test_the_way_out_where_the_base_is_the_changed_one(tmp_path):
    adapted = started("pissa")
    changed = [weight.detach().clone() for weight in base_weights(adapted)]
    train(adapted)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "adapter")
    model = Layers()
    for (name, module), weight in zip(
        sorted(read_adapter(tmp_path / "adapter").modules.items()), changed, strict=True
    ):
        model.get_submodule(name).weight.data = weight + module.scaling * (module.b @ module.a)
    torch.testing.assert_close(model(INPUT), adapted(INPUT), rtol=1e-4, atol=1e-5)


def test_where_peft_has_no_conversion_none_is_offered(tmp_path):
    config = {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"0": 2}}
    with pytest.raises(ValueError, match="no conversion of it to plain LoRA with use_rslora"):
        check_initialisation("file", config)
    with pytest.raises(ValueError, match=r"\(LoftQ\).* no conversion of it to plain LoRA; if"):
        check_initialisation("file", {"init_lora_weights": "loftq"})
    adapted = started("pissa")
    adapted.peft_config["default"].use_rslora = True
    adapted.peft_config["default"].rank_pattern = {"0": 2}
    folder = str(tmp_path / "before")
    with pytest.raises(ValueError, match="is not supported when using `rank_pattern`"):
        adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=folder)


@pytest.mark.parametrize("way", ["pizza", "", "EVA2", 1, 0.5, [], {"pissa": 4}])
def test_an_initialisation_that_the_table_lacks_is_refused(way):
    with pytest.raises(ValueError, match="must be true, false or one of eva, gaussian, mica"):
        check_initialisation("file", {"init_lora_weights": way})


def test_an_option_that_the_table_lacks_is_refused_when_it_is_set():
    with pytest.raises(ValueError, match="the option new_way = 3 is unknown"):
        check_options("file", {"new_way": 3})
    for unset in (None, False, "", [], {}, 0):
        check_options("file", {"new_way": unset})


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_not_plain_lora_is_refused(option):
    with pytest.raises(ValueError, match=rf"{option} = \['x'\] is not plain LoRA: "):
        check_options("file", {option: ["x"]})
    for unset in (None, False, [], {}):
        check_options("file", {option: unset})
