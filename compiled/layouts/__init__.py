"""A weight in memory: each layout holds the checkpoint's bits once, in an order for kernels."""
