"""Names of Mixtral's experts in memory and in checkpoints."""

import pytest
import torch

from int4_lora.integration import AdapterModule
from int4_lora.integration.adapter.older_names import with_older_names

EXPERT = "model.layers.0.mlp.experts.0."
OLDER = "model.layers.0.block_sparse_moe.experts.0."
GATE_UP = AdapterModule(torch.ones(1, 2), torch.arange(4.0).view(4, 1), 1.0)


def test_rows_of_gate_are_w1_and_rows_of_up_are_w3():
    base = {f"{OLDER}{part}" for part in ("w1", "w2", "w3")}
    modules, notes = with_older_names({f"{EXPERT}gate_up_proj": GATE_UP}, base)
    assert {name: module.b.flatten().tolist() for name, module in modules.items()} == {
        f"{OLDER}w1": [0.0, 1.0],
        f"{OLDER}w3": [2.0, 3.0],
    }
    assert len(notes) == 1


def test_what_the_base_has_or_has_not_under_the_older_name_is_left_alone():
    names = [f"{EXPERT}gate_up_proj", "model.layers.0.mlp.gate", f"{EXPERT}up_proj", "q_proj"]
    modules = dict.fromkeys(names, GATE_UP)
    for base in ({f"{OLDER}w1"}, set(names) | {f"{OLDER}{part}" for part in ("w1", "w3")}):
        assert with_older_names(modules, base) == (modules, ())


def test_rows_that_cannot_be_halved_are_refused():
    odd = AdapterModule(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    base = {f"{OLDER}w1", f"{OLDER}w3"}
    with pytest.raises(ValueError, match="3 rows cannot be split into 2"):
        with_older_names({f"{EXPERT}gate_up_proj": odd}, base)
