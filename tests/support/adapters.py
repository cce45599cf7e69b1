"""Adapters compared layer by layer."""

import torch


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        assert torch.equal(module.a, theirs[name].a)
        assert torch.equal(module.b, theirs[name].b)
        assert module.scaling == theirs[name].scaling
