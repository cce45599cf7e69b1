"""The ways to compute the layer, each in a file of its own with the roundings it declares."""

from int4_lora.compiled.formulations.definition import DEFINITION
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.formulations.gemv import GEMV
from int4_lora.compiled.formulations.int4pack import INT4PACK
from int4_lora.compiled.formulations.int8pack import INT8PACK
from int4_lora.compiled.formulations.magic_gemv import MAGIC_GEMV
from int4_lora.compiled.formulations.split_k import SPLIT_K
from int4_lora.compiled.formulations.tiles import TILES

__all__ = [
    "DEFINITION",
    "FORMULATIONS",
    "GEMV",
    "INT4PACK",
    "INT8PACK",
    "MAGIC_GEMV",
    "SPLIT_K",
    "TILES",
    "Formulation",
]

FORMULATIONS = {
    formulation.name: formulation
    for formulation in (INT4PACK, INT8PACK, MAGIC_GEMV, SPLIT_K, GEMV, TILES, DEFINITION)
}
