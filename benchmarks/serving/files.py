"""Make the model and the adapters once, and keep them in a cache folder.

The weights are random; compressed-tensors and PEFT write the files.

Source: ``int4_lora.integration.demo.recipe``.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.workloads import ADAPTERS

RECIPE = 1  # increase it when the files change for equal sizes
RANK = 16
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@dataclass(frozen=True)
class Files:
    """The folders of the model and the adapters.

    Args:
        model: the checkpoint's folder.
        adapters: the folder of each adapter.
    """

    model: Path
    adapters: list[Path]


def llama(hidden, layers):
    """Return the sizes of a Llama; for hidden size 2048: intermediate size 5632, 16 heads.

    Args:
        hidden: the hidden size, a multiple of 256.
        layers: the number of decoder layers.
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


def adapters_share(hidden):
    """Return the operations of an adapter of every linear layer, over those of their bases.

    A token multiplies a base of ``out x in`` numbers, and ``RANK x (in + out)`` of an adapter.
    """
    sizes = llama(hidden, 1)
    kept = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    inner = sizes["intermediate_size"]
    shapes = [
        (hidden, hidden),
        (kept, hidden),
        (kept, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    return RANK * sum(a + b for a, b in shapes) / sum(a * b for a, b in shapes)


def prepare(cache, hidden, layers):
    """Return the files; make them if the cache lacks them.

    The files are made in a temporary folder, which is then renamed, so that a stopped run leaves no
    incomplete files.
    """
    folder = Path(cache) / f"serving-h{hidden}-l{layers}-r{RANK}-{RECIPE}"
    if not folder.is_dir():
        from int4_lora.integration.demo import recipe

        sizes = llama(hidden, layers)
        settings = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            recipe.make_model(new / "model", sizes, WEIGHTS)
            for number in range(ADAPTERS):
                seed = chr(ord("a") + number)  # make_adapter seeds with the sum of the letters
                recipe.make_adapter(new / f"a{number}", sizes, seed, settings)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return Files(folder / "model", [folder / f"a{number}" for number in range(ADAPTERS)])
