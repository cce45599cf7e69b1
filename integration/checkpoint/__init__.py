"""Open, inspect, verify and unpack checkpoints of compressed-tensors."""
