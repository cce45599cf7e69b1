"""Measure the table that this project's request began with: ``python -m benchmarks.seed_table``.

It compares FP16, INT4, and INT4 with an adapter of rank 16 for the linear layers of Llama-2-7B with
random weights. ``shapes`` has the model's sizes, ``holder`` is the process that holds one kind of
weights and computes, ``report`` prints.

Source: the request's table, which ``report`` quotes.
"""
