"""Measure vLLM with and without our plug-in in one run: ``python -m benchmarks.serving``.

``workloads`` has the requests, ``files`` makes the model and the adapters, ``engine`` is the
process that vLLM runs in, ``rounds`` takes turns between the engines, ``bars`` judges and
``report`` prints. Only ``engine`` imports vLLM.

Source: ``benchmarks/results/README.md``.
"""
