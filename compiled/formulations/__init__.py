"""The layer's identities, each in its own file with the roundings it declares.

Source: ``docs/compiled.md``.
"""

from int4_lora.compiled.formulations.definition import DEFINITION
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.formulations.gemv import GEMV
from int4_lora.compiled.formulations.int4pack import INT4PACK
from int4_lora.compiled.formulations.magic_gemv import MAGIC_GEMV
from int4_lora.compiled.formulations.planes import PLANES
from int4_lora.compiled.formulations.tiles import TILES

__all__ = [
    "DEFINITION",
    "FORMULATIONS",
    "GEMV",
    "INT4PACK",
    "MAGIC_GEMV",
    "PLANES",
    "TILES",
    "Formulation",
]

FORMULATIONS = {one.name: one for one in (INT4PACK, MAGIC_GEMV, GEMV, PLANES, TILES, DEFINITION)}
