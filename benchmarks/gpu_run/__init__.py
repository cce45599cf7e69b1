"""Measure and check all that needs a GPU, in one command: ``python -m benchmarks.gpu_run``.

``run`` holds what the parts share. The parts, in the order in which they run: ``layers`` measures
the layer beside its peers, ``sweep`` the launches of the formulations that lead, ``conformance``
judges those formulations, ``served`` replays the vLLM plug-in's operator from a CUDA graph,
``profiled`` lists the kernels of one layer. ``rehearsal`` compiles the kernels without a GPU.
"""
