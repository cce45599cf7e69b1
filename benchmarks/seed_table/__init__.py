"""Measure FP16, INT4 and INT4 + LoRA beside target figures: ``python -m benchmarks.seed_table``.

The table compares the linear layers of Llama-2-7B, with random weights, in FP16, in INT4, and in
INT4 with an adapter of rank 16. ``shapes`` has the model's sizes. ``holder`` is the process that
holds one kind of weights and computes with them. ``report`` prints the table, with the target
figures in its last column.
"""
