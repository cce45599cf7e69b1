"""The warning of an adapter whose modules match no layer, without vLLM."""

import logging

import pytest

from int4_lora.integration.vllm_plugin.adapter_names import unmatched_warning
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine

PARTS = ("self_attn.q_proj", "mlp.down_proj")


def names(prefix, layers=2):
    return [f"{prefix}layers.{layer}.{part}" for layer in range(layers) for part in PARTS]


def test_an_adapter_that_matches_is_not_warned_of():
    assert unmatched_warning(names("model."), {*names("model."), "lm_head"}) is None


@pytest.mark.parametrize(
    ("trained", "served", "old", "new"),
    [
        ("model.language_model.", "model.", "model.language_model.", "model."),
        ("model.", "language_model.model.", "model.", "language_model.model."),
        ("", "model.", "layers.", "model.layers."),
    ],
)
def test_the_change_of_prefix_is_named(trained, served, old, new):
    vision = {f"visual.blocks.{layer}.mlp.down_proj" for layer in range(9)}
    assert unmatched_warning(names(trained), {*names(served), *vision}) == (
        "none of its 4 modules match a layer, so that the base model serves it; the first is "
        f"{trained}layers.0.self_attn.q_proj; all would match if names that start with "
        f"{old!r} started with {new!r}"
    )


def test_some_modules_of_layers_that_are_not_there():
    assert unmatched_warning(names("model.", 3), {*names("model.")}) == (
        "2 of its 6 modules match no layer and are left out; the first is "
        "model.layers.2.self_attn.q_proj"
    )


def test_several_changes_and_several_rules():
    known = {*names("encoder."), *names("decoder.")}
    assert unmatched_warning(names("model."), known).endswith(
        "all would match if names that start with 'model.' started with 'decoder.', or names that "
        "start with 'model.' started with 'encoder.'"
    )
    known = {*names("language_model.model."), "language_model.lm_head"}
    trained = [*names("model.language_model."), "lm_head"]
    assert unmatched_warning(trained, known).endswith(
        "all would match if names that start with 'model.language_model.' started with "
        "'language_model.model.' and names that start with 'lm_head' started with "
        "'language_model.lm_head'"
    )


def test_an_adapter_is_warned_of_once(caplog):
    engine, known = ServedEngine(), names("model.")
    with caplog.at_level(logging.WARNING, logger="vllm.int4_lora"):
        for _ in range(2):
            engine.warn_unmatched("sql", "/adapters/sql", names("decoder."), known)
        engine.warn_unmatched("fits", "/adapters/fits", known, known)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "int4_lora: adapter sql (/adapters/sql): none of its 4 modules match a layer"
    )
