"""What others wrote that computes the same layer: one file for each of them.

Each file has ``PEERS``, or ``ADAPTERS`` for what adds adapters after a base; it imports what it
needs only when it is asked. A peer that cannot run is listed with the reason. Importing vLLM
patches parts of Inductor, with which our own graphs are compiled too in the same run.

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
