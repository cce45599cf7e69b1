"""Layouts of a weight in memory: each holds the checkpoint's bits once, as kernels read them."""
