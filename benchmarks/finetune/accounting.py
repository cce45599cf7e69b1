"""Count the bytes that a checkpoint stores and that a model holds, and what they may be at most.

Source: ``docs/format.md`` for the tensors of a quantised module.
"""

import math
from dataclasses import dataclass

from int4_lora.integration import open_checkpoint

BF16 = 2  # bytes of a weight
LAYOUT = 1.12  # the most bytes of a layout, per byte of the checkpoint's INT4 tensors


@dataclass(frozen=True)
class Stored:
    """The bytes of an INT4 checkpoint.

    Args:
        int4: of the tensors of all quantised modules.
        dense: of all other tensors.
        as_bf16: of the quantised modules' weights in bfloat16.
        layer_as_bf16: of the largest quantised module's weight in bfloat16.
    """

    int4: int
    dense: int
    as_bf16: int
    layer_as_bf16: int

    def most_peak(self, dense_peak):
        """Return what a training step may take if a dense model's takes ``dense_peak`` bytes.

        That is the dense peak without the quantised weights, and with their INT4 layout and a
        single dense layer in their place.
        """
        return dense_peak - self.as_bf16 + LAYOUT * self.int4 + self.layer_as_bf16

    def layout_share(self, held):
        """Return the bytes of the layout per byte of the checkpoint's INT4 tensors.

        Args:
            held: the bytes of all tensors of the model.
        """
        return (held - self.dense) / self.int4


def stored(folder):
    """Return the bytes of an INT4 checkpoint."""
    checkpoint = open_checkpoint(folder)
    shapes = [checkpoint.shape_of(name) for name in checkpoint.modules()]
    weights = [BF16 * math.prod(shape) for shape in shapes]
    names = {f"{name}.{part}" for name, parts in checkpoint.parts.items() for part in parts}
    int4 = sum(checkpoint.tensors[name].nbytes for name in names)
    everything = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return Stored(int4, everything - int4, sum(weights), max(weights))


def held_bytes(model):
    """Return the bytes of a model's parameters and buffers; shared memory counts once.

    Args:
        model: a ``torch.nn.Module``.
    """
    tensors = [*model.parameters(), *model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
