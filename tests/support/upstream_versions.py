"""What the installed compressed-tensors and transformers do differently from the format."""

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

INSTALLED = Version(version("compressed-tensors"))

# 0.15 raises NotImplementedError
CANNOT_DECOMPRESS_MXFP4 = Version("0.16") > INSTALLED
# 0.19 removed actorder "group": it refuses to write it, and decompresses without weight_g_idx
IGNORES_G_IDX = Version("0.19") <= INSTALLED
# 0.20 cannot unpack zero-points that fill one word: it views a strided tensor as bytes
CRASHES_ON_ONE_WORD = Version("0.20") <= INSTALLED
# up to 0.17 block sizes are inferred from shapes, which a ragged last block misleads
GUESSES_BLOCKS = Version("0.18") > INSTALLED
# from 0.18 zero-points are not packed on the meta device, whose shapes transformers compares from
# 5.23 on: from_pretrained refuses asymmetric checkpoints
REFUSES_ZERO_POINTS = (
    Version("0.18") <= INSTALLED
    and find_spec("transformers") is not None
    and Version("5.23") <= Version(version("transformers"))
)
