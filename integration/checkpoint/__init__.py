"""Checkpoints of compressed-tensors: opened, inspected, verified and unpacked."""
