"""What every option and every initialisation of PEFT's LoraConfig means for a saved adapter.

Each option is in one of three groups, and each initialisation in one of two. What is in none is
refused, because PEFT gains options and initialisations that change what an adapter adds.
``tests/integration/adapter/test_peft_table.py`` fails when the installed PEFT has one more.

Source: ``LoraConfig`` in ``peft/tuners/lora/config.py`` and ``LoraLayer.update_layer`` in
``peft/tuners/lora/layer.py``, PEFT 0.18 to 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["READ", "REFUSED", "UNUSED", "changes_the_base", "check_initialisation", "check_options"]

# Options that are read, and checked where they are read.
READ = frozenset(
    {
        "peft_type",
        "peft_version",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "inference_mode",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
    }
)

# Options that do not change what the saved matrices add to the base.
UNUSED = frozenset(
    {
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "lora_dropout",
        "megatron_core",  # used with megatron_config only
        "qalora_group_size",  # used with use_qalora only
        "runtime_config",
        # settings of an initialisation, which init_lora_weights chooses
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        # PEFT 0.2: whether evaluation merges the matrices into the weight
        "merge_weights",
        # added by ms-swift: the dtype and the learning rates of the training
        "lora_dtype",
        "lorap_lr_ratio",
        "lorap_emb_lr",
    }
)

# Options with which a layer is not y = W x + scaling * B A x, and why.
REFUSED = {
    "use_dora": "DoRA also scales each row of the weight",
    "use_qalora": "QALoRA adds its product to averages of the input",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "the base stores its weights transposed",
    "layer_replication": "the base's layers are repeated",
    "alora_invocation_tokens": "aLoRA is active after its invocation tokens only",
    "arrow_config": "Arrow mixes several adapters for each token",
    "kasa_config": "KaSA changes the base's weights and scales each rank",
    "monteclora_config": "MonteCLoRA samples its matrices",
    "velora_config": "VeLoRA saves further tensors",
    "megatron_config": "the layers are Megatron's parallel ones",
}

# Initialisations that leave the base's weights alone.
PLAIN = frozenset({"gaussian", "eva", "orthogonal", "mica"})

# Initialisations that subtract their first product from the base's weights, by the name's start.
CHANGES_THE_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
WAY_OUT = (
    "convert it to plain LoRA with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=FOLDER), where FOLDER holds the adapter as it was "
    "before training"
)
NO_WAY_OUT = "PEFT has no conversion of it to plain LoRA"
NO_WAY_OUT_WITH_RSLORA = f"{NO_WAY_OUT} with use_rslora and rank_pattern or alpha_pattern"
SAME_BASE = (
    "if the base has the changed weights already, because it was saved after LoRA was started, set "
    "init_lora_weights to true"
)


def check_options(file: object, config: Mapping[str, Any]) -> None:
    """Check that no option makes an adapter more than plain LoRA.

    Args:
        file: adapter_config.json, for the messages.
        config: its content.

    Raises:
        ValueError: an option that changes what an adapter adds is set, or an unknown one is; the
            message names the option.
    """
    for option, value in config.items():
        if option in READ or option in UNUSED or not value:
            continue
        if option in REFUSED:
            raise ValueError(f"{file}: {option} = {value!r} is not plain LoRA: {REFUSED[option]}")
        raise ValueError(
            f"{file}: the option {option} = {value!r} is unknown, so that what the adapter adds "
            f"is unknown; if it changes nothing there, remove it from {file}"
        )


def check_initialisation(file: object, config: Mapping[str, Any]) -> None:
    """Check that an adapter's initialisation left the base's weights alone.

    Args:
        file: adapter_config.json, for the messages.
        config: its content.

    Raises:
        ValueError: the initialisation changes the base's weights, or is unknown; the message names
            it and what can be done.
    """
    way = config.get("init_lora_weights", True)
    if way is None or type(way) is bool:
        return
    if _lower(way) in PLAIN:
        return
    method = changes_the_base(way)
    if method is None:
        raise ValueError(
            f"{file}: init_lora_weights must be true, false or one of {', '.join(sorted(PLAIN))}, "
            f"got {way!r}: an unknown initialisation may have changed the base's weights"
        )
    raise ValueError(
        f"{file}: init_lora_weights = {way!r} changes the base's weights at its start "
        f"({method}), so that the adapter alone does not say what it adds; "
        f"{_way_out(method, config)}; {SAME_BASE}"
    )


def changes_the_base(way: object) -> str | None:
    """Return the method's name if an initialisation changes the base's weights, or None.

    Args:
        way: the option ``init_lora_weights``.

    Example:
        >>> changes_the_base("pissa_niter_4"), changes_the_base(True)
        ('PiSSA', None)
    """
    methods = (
        method for start, method in CHANGES_THE_BASE.items() if _lower(way).startswith(start)
    )
    return next(methods, None)


def _lower(way: object) -> str:
    """Return a name in lower case: PEFT ignores the case of some initialisations."""
    return way.lower() if isinstance(way, str) else ""


def _way_out(method: str, config: Mapping[str, Any]) -> str:
    if method == "LoftQ":
        return NO_WAY_OUT
    if config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        return NO_WAY_OUT_WITH_RSLORA
    return WAY_OUT
