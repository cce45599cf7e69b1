"""Find the float weights that config.json calls quantised.

transformers follows the config: it looks for the tensors of a quantised weight, finds none, starts
the layer at random, and reports the float weight as unexpected.

Source: ``apply_quantization_config`` in ``compressed_tensors/quantization/lifecycle/apply.py``;
the load report of ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

from int4_lora.integration.checkpoint.open import FLOATS, Checkpoint
from int4_lora.integration.checkpoint.quantization_config import METHOD, method_of
from int4_lora.integration.checkpoint.scheme import read_groups
from int4_lora.integration.checkpoint.target_matching import (
    EMBEDDING,
    compile_targets,
    groups_by_name,
    ignored,
)

__all__ = ["unpacked_notes"]

MOST_NAMES = 8


def unpacked_notes(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence that names the float weights that config.json calls quantised, if any are.

    GPTQ and AWQ have none: their tensors alone tell which modules are quantised. In
    compressed-tensors, these are the matrices that a config group targets, by their name or by
    their class, and that ignore does not name. The class of a module is not in the files, so the
    sentence has it as a condition.

    Args:
        checkpoint: an open checkpoint.

    Raises:
        ValueError: config.json cannot be read.

    Example:
        >>> unpacked_notes(open_checkpoint("my-model-W4A16"))  # doctest: +SKIP
        []
    """
    if method_of(checkpoint.quantization) != METHOD:
        return []
    matrices = [
        name.removesuffix(".weight")
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in FLOATS
    ]
    plain = [name for name in matrices if name not in checkpoint.schemes]
    exempt = {*ignored(checkpoint.path / "config.json", checkpoint.quantization, plain)}
    targeted = _targeted(checkpoint, [name for name in plain if name not in exempt])
    if not targeted:
        return []
    others = len(targeted) - MOST_NAMES
    more = f" and {others} more" if others > 0 else ""
    return [
        "float weights that config.json targets and ignore does not name: "
        f"{', '.join(targeted[:MOST_NAMES])}{more}. For each that is a linear layer or an "
        "embedding, transformers finds no quantised tensors and starts it at random: add it to "
        "ignore"
    ]


def _targeted(checkpoint: Checkpoint, modules: list[str]) -> list[str]:
    """Return the modules that a group of a quantised format targets by name or may by class."""
    file = checkpoint.path / "config.json"
    schemes, by_group = read_groups(file, checkpoint.config)
    by_group = {name: by_group[name] for name in by_group if schemes[name].format != "dense"}
    targets = compile_targets(file, by_group)
    classes = {target for names in by_group.values() for target in names}
    return [
        name
        for name in modules
        if ("Embedding" if EMBEDDING.fullmatch(name) else "Linear") in classes
        or groups_by_name(name, targets)
    ]
