"""The sizes of a Llama in bytes, and how many of its layers fit into memory.

Norms are left out: 0.5 MB of 13.5 GB.

Source: ``config.json`` of Llama-2-7B.
"""

from dataclasses import dataclass
from pathlib import Path

DENSE, INT4, LORA = "dense", "INT4", "INT4 + LoRA"
KINDS = (DENSE, INT4, LORA)
USED_BY_TORCH = 1.5e9  # bytes of a process after compiling, without weights
SHARE = 0.7  # of the free memory, for weights


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Args:
        hidden: columns of most linear layers.
        intermediate: rows of the MLP's first two.
        vocabulary: rows of embedding and lm_head, which stay in 16 bits.
        layers: the number of decoder layers.
        group_size: columns that share a scale.
        rank: the rank of the adapter, which changes every linear layer of the decoder.
    """

    hidden: int = 4096
    intermediate: int = 11008
    vocabulary: int = 32000
    layers: int = 32
    group_size: int = 128
    rank: int = 16

    @property
    def linears(self):
        """The (out_features, in_features) of one decoder layer: q, k, v, o, gate, up, down."""
        square, up = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        return [square] * 4 + [up] * 2 + [(self.hidden, self.intermediate)]

    def layer_bytes(self, kind):
        """Return the bytes of one decoder layer in a checkpoint, and of its adapter."""
        if kind == DENSE:
            return sum(2 * rows * columns for rows, columns in self.linears), 0
        packed = sum(
            rows * (columns // 2 + 2 * columns // self.group_size) for rows, columns in self.linears
        )
        adapter = sum(2 * self.rank * (rows + columns) for rows, columns in self.linears)
        return packed, adapter if kind == LORA else 0

    @property
    def outside_bytes(self):
        """The bytes of embedding and lm_head."""
        return 2 * 2 * self.vocabulary * self.hidden

    def whole_bytes(self, kind):
        """Return the bytes of the whole model, its adapter included."""
        return self.layers * sum(self.layer_bytes(kind)) + self.outside_bytes


def layers_that_fit(model, free_bytes):
    """Return how many layers of all kinds fit into memory together, at least 1.

    Args:
        model: the model's sizes.
        free_bytes: the free memory in bytes.
    """
    fixed = len(KINDS) * (model.outside_bytes + USED_BY_TORCH)
    each = sum(sum(model.layer_bytes(kind)) for kind in KINDS)
    return max(1, min(model.layers, int((SHARE * free_bytes - fixed) // each)))


def free_bytes(device):
    """Return the free memory of a device in bytes, or 16 GB if it is unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    file = Path("/proc/meminfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 16e9
