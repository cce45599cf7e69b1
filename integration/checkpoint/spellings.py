"""The names that one module has in transformers' layouts of a model.

A model with several towers keeps its text model under ``language_model``. transformers >= 4.52 puts
all towers into one ``model`` in memory, and writes many families under the names of before:

=========================  ==============================  =========================
a layer                    the head                        where
=========================  ==============================  =========================
``model.language_model.``  ``lm_head``                     in memory, since 4.52
``language_model.model.``  ``language_model.lm_head``      in files; in memory before
``model.``                 ``lm_head``                     the text model alone
``language_model.``        ``lm_head``                     the towers without a head
none                       ``lm_head``                     the text model, no head
``model.language_model.model.``  ``model.language_model.lm_head``  HyperCLOVA's files
=========================  ==============================  =========================

The text model is called ``text_model`` in Emu3 and SmolVLM. Other towers and projectors have the
same name in memory and in files, with or without ``model.``.

Source: ``transformers/conversion_mapping.py`` of transformers 5.19, and
``_checkpoint_conversion_mapping`` of its model classes before 5.
"""

from __future__ import annotations

import re

__all__ = ["spellings"]

TEXT_MODELS = ("language_model", "text_model")
LAYOUTS = (  # of the layers, and of the head; {} is the text model's name
    ("model.{}.", ""),
    ("{}.model.", "{}."),
    ("model.", ""),
    ("{}.", ""),
    ("", ""),
    ("model.{}.model.", "model.{}."),
)
OWN = re.compile(  # what follows the prefix of a text model, and of no other tower
    r"(layers|embed_tokens|embed_tokens_per_layer|per_layer_model_projection|"
    r"per_layer_projection_norm|norm|rotary_emb)(\.|\Z)"
)
HEAD = re.compile(r"lm_head(\.|\Z)")
VISION = re.compile(r"((?:model\.)?vision_tower\.)(vision_model\.)?(.+)")


def spellings(name: str) -> tuple[str, ...]:
    """Return a module's name, and its names in transformers' other layouts.

    Args:
        name: the full name of a module or of a tensor.

    Returns:
        ``name`` first, then the others, each once. Most of them do not exist in a given model.

    Example:
        >>> spellings("language_model.lm_head")[:2]
        ('language_model.lm_head', 'lm_head')
        >>> spellings("visual.blocks.0.attn.qkv")
        ('visual.blocks.0.attn.qkv', 'model.visual.blocks.0.attn.qkv')
    """
    text = _text_model_of(name)
    for position, rule in enumerate((OWN, HEAD)):
        rest = _after_prefix(name, text, position, rule)
        if rest is not None:
            models = (text,) if text else TEXT_MODELS
            prefixes = [layout[position].format(model) for model in models for layout in LAYOUTS]
            return tuple(dict.fromkeys((name, *(prefix + rest for prefix in prefixes))))
    return tuple(dict.fromkeys((name, *_of_another_tower(name))))


def _text_model_of(name: str) -> str | None:
    """Return the text model's name if ``name`` begins with it."""
    first = name.removeprefix("model.").partition(".")[0]
    return first if first in TEXT_MODELS else None


def _after_prefix(name: str, text: str | None, position: int, rule: re.Pattern[str]) -> str | None:
    """Return what follows the prefix of a layout, or None if ``name`` is of no layout.

    Args:
        name: the full name.
        text: the text model's name, if ``name`` begins with it.
        position: 0 for a layer, 1 for the head.
        rule: what may follow the prefix.
    """
    prefixes = {layout[position].format(text or TEXT_MODELS[0]) for layout in LAYOUTS}
    for prefix in sorted(prefixes, key=len, reverse=True):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rule.match(rest):
            return rest
    return None


def _of_another_tower(name: str) -> list[str]:
    """Return the other spellings of a module that is not in the text model."""
    match = VISION.fullmatch(name)
    inner = ["", "vision_model."] if match else [""]
    names = [match[1] + part + match[3] for part in inner] if match else [name]
    bare = [one.removeprefix("model.") for one in names]
    return [prefix + one for one in bare for prefix in ("", "model.")]
