"""The table that this project's request began with, measured: ``python -m benchmarks.seed_table``.

FP16, INT4, and INT4 with adapters of rank 16, for the linear layers of Llama-2-7B with random
weights. ``shapes`` says what a model is made of, ``holder`` is the process that holds one kind of
weights and computes, ``report`` prints.

Source: the request's table, which ``report`` quotes.
"""
