"""The peers, other kernels that compute the same layer: one file for each.

Each file has ``PEERS``, or ``ADAPTERS`` for what adds adapters to a base. It imports its library
only when it is used. A peer that cannot run is listed with the reason. Importing vLLM patches parts
of Inductor, which then also compiles our graphs in the same run.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.peers import torch_int4, torchao_int4, vllm_cpu, vllm_machete, vllm_marlin

__all__ = ["PEERS"]

PEERS = (
    *torch_int4.PEERS,
    *torchao_int4.PEERS,
    *vllm_cpu.PEERS,
    *vllm_marlin.PEERS,
    *vllm_machete.PEERS,
)
