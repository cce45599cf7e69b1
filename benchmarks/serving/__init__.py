"""Measure vLLM with and without our plug-in in one run: ``python -m benchmarks.serving``.

``workloads`` defines the requests. ``files`` makes the model and the adapters. ``engine`` is the
process that runs vLLM. ``rounds`` runs the engines in turn, ``bars`` judges the results, and
``report`` prints them. Only ``engine`` imports vLLM.

Source: ``benchmarks/results/README.md``.
"""
