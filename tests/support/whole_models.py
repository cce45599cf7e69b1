"""The rule for whole models of docs/numerics.md, for logits and for gradients."""

import torch

from int4_lora.integration.demo.models import Float64Inside
from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.judging.verdict import rms_of


def in_float64(call, *args, **kwargs):
    """Return ``call(...)`` with norms, rotary angles and softmax in float64, too."""
    with Float64Inside():
        return call(*args, **kwargs)


def assert_as_good(ours, theirs, truth, dtype=None):
    """Check a result of low precision: an rms error of at most twice that of eager PyTorch.

    Args:
        ours: the result.
        theirs: the dense model's, computed eagerly in the same dtype.
        truth: the dense model's in float64.
        dtype: the dtype of the arithmetic, if it is not that of the result.
    """
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.isfinite().all()
    floor = FORMATS[dtype or ours.dtype].u / 2 * rms_of(truth)
    assert rms_of(ours.double() - truth) <= 2 * rms_of(theirs.double() - truth) + floor


def assert_exact(ours, truth):
    """Check a result of float64: at most 1e-9 of the largest value from the truth."""
    assert (ours.dtype, ours.shape) == (torch.float64, truth.shape)
    assert (ours - truth).abs().max() <= 1e-9 * truth.abs().max()
