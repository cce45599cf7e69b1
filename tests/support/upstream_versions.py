"""What the installed compressed-tensors is known to do differently from the format."""

from importlib.metadata import version

from packaging.version import Version

INSTALLED = Version(version("compressed-tensors"))

# 0.19 removed actorder "group": it refuses to write it, and decompresses without weight_g_idx
IGNORES_G_IDX = Version("0.19") <= INSTALLED
# 0.20 cannot unpack zero-points that fill one word: it views a strided tensor as bytes
CRASHES_ON_ONE_WORD = Version("0.20") <= INSTALLED
# up to 0.17 block sizes are inferred from shapes, which a ragged last block misleads
GUESSES_BLOCKS = Version("0.18") > INSTALLED
# with 0.20 transformers refuses to load zero-points: it expects them of another shape
REFUSES_ZERO_POINTS = Version("0.20") <= INSTALLED
