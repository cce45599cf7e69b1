"""The peers: other kernels that compute the same layer, each in its own file.

Each file defines ``PEERS``, or ``ADAPTERS`` for kernels that add adapters to a base. It imports its
library only when a peer is used. A peer that cannot run is listed with the reason. Importing vLLM
patches parts of Inductor, so our graphs in the same run are compiled by the patched Inductor.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.peers import (
    gemlite_int4,
    torch_int4,
    torchao_int4,
    vllm_cpu,
    vllm_machete,
    vllm_marlin,
    zentorch_int4,
)

__all__ = ["PEERS"]

PEERS = (
    *torch_int4.PEERS,
    *torchao_int4.PEERS,
    *gemlite_int4.PEERS,
    *zentorch_int4.PEERS,
    *vllm_cpu.PEERS,
    *vllm_marlin.PEERS,
    *vllm_machete.PEERS,
)
