"""Inspect and check the GPU code that Inductor generates, on a machine without a GPU."""
