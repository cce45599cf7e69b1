"""Measure fine-tuning on an INT4 base beside dense bf16: ``python -m benchmarks.finetune``.

``files`` makes the INT4 model and its dense twin. ``contender`` is the process that loads, trains
and generates. ``starts`` runs fresh processes, for memory and first forwards; ``rounds`` runs
long-lived processes in turn, for speed. ``accounting`` counts bytes, ``bars`` judges the results,
and ``report`` prints them.

Source: ``benchmarks/results/README.md``.
"""
