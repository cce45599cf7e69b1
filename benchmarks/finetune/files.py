"""Make an INT4 Llama and its dense twin once, and keep them in a cache folder.

compressed-tensors writes the INT4 checkpoint. The twin has the same weights, dequantised.

Source: ``int4_lora.integration.demo.recipe`` and ``int4_lora.integration.conversion``.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.files import WEIGHTS, llama
from int4_lora.atomic_files import new_folder

RECIPE = 1  # increase it when the files change for equal sizes


@dataclass(frozen=True)
class Files:
    """The folders of the two checkpoints.

    Args:
        int4: the INT4 checkpoint.
        dense: the checkpoint in bfloat16 with the same weights, dequantised.
    """

    int4: Path
    dense: Path


def sizes(hidden, layers):
    """Return the sizes of the Llama, as ``LlamaConfig`` takes them; its embedding is tied."""
    return {**llama(hidden, layers), "tie_word_embeddings": True}


def prepare(cache, hidden, layers):
    """Return the files; make them if the cache lacks them.

    Args:
        cache: the cache folder.
        hidden: the hidden size, a multiple of 256.
        layers: the number of decoder layers.
    """
    folder = Path(cache) / f"finetune-h{hidden}-l{layers}-{RECIPE}"
    if not folder.is_dir():
        with new_folder(folder) as made:
            make(made, sizes(hidden, layers))
    return Files(folder / "int4", folder / "dense")


def make(folder, llama_sizes):
    """Make both checkpoints in a folder.

    Args:
        folder: the folder for the folders ``int4`` and ``dense``.
        llama_sizes: as ``LlamaConfig`` takes them.
    """
    from int4_lora.integration.conversion import unpack_checkpoint
    from int4_lora.integration.demo import recipe

    recipe.make_model(folder / "int4", llama_sizes, WEIGHTS)
    unpack_checkpoint(folder / "int4", folder / "dense")


def read_once(folder):
    """Read a checkpoint's files, so that the first process to load them is not slower."""
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
