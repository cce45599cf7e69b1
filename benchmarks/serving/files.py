"""The model and the adapters, made once and kept in a cache folder.

The weights are random; the files are what compressed-tensors and PEFT write for any model.

Source: ``int4_lora.integration.demo.recipe``.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.workloads import ADAPTERS

RECIPE = 1  # counts up when other files would be made of the same sizes
RANK = 16
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@dataclass(frozen=True)
class Files:
    """Where they are.

    Args:
        model: the checkpoint's folder.
        adapters: the folder of each adapter.
    """

    model: Path
    adapters: list[Path]


def llama(hidden, layers):
    """Return the sizes of a Llama of a width: 5632 wide inside and 16 heads at 2048.

    Args:
        hidden: a multiple of 256.
        layers: how many decoder layers.
    """
    heads = hidden // (128 if hidden >= 1024 else 64)
    return {
        "hidden_size": hidden,
        "intermediate_size": -(-11 * hidden // 512) * 128,  # 11 / 4, in whole groups
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 8192 if hidden >= 1024 else 512,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }


def prepare(cache, hidden, layers):
    """Return the files, made first where the cache has none.

    They are made beside their place and renamed: a run that was stopped leaves nothing that looks
    whole.
    """
    folder = Path(cache) / f"serving-h{hidden}-l{layers}-r{RANK}-{RECIPE}"
    if not folder.is_dir():
        from int4_lora.integration.demo import recipe

        sizes = llama(hidden, layers)
        settings = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            recipe.make_model(made / "model", sizes, WEIGHTS)
            for number in range(ADAPTERS):
                seed = chr(ord("a") + number)  # names seed by the sum of their letters
                recipe.make_adapter(made / f"a{number}", sizes, seed, settings)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return Files(folder / "model", [folder / f"a{number}" for number in range(ADAPTERS)])
