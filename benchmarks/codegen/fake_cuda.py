"""Fake an H200: enough of torch.cuda for Inductor to generate Triton for sm_90.

Only this file replaces parts of torch and Triton, and only in the versions that it was written for.
Code can be generated and compiled for the fake device, but nothing can run on it.

Source: NVIDIA's figures for the H200 SXM (compute capability 9.0).
"""

import subprocess
import sysconfig
import tempfile
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

VERSIONS = {"torch": "2.13", "triton": "3.7"}
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20,
    gcnArchName="",
    is_integrated=0,
    uuid="0",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
)


class _Stream:
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def synchronize(self):
        """Do nothing."""


def install():
    """Make torch see an H200; call this once, before anything is compiled.

    Raises:
        RuntimeError: this file was not written for the installed versions.
    """
    import triton

    for name, found in (("torch", torch.__version__), ("triton", triton.__version__)):
        if not found.startswith(VERSIONS[name] + "."):
            raise RuntimeError(f"{name} must be {VERSIONS[name]} to be told of a GPU, got {found}")
    _load_guard()
    _replace_torch_cuda()
    _replace_driver(triton)
    _replace_inductor()


def _load_guard():
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"noop_guard{sysconfig.get_config_var('SHLIB_SUFFIX')}"
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        source = Path(__file__).with_name("noop_guard.cpp")
        options = ["-shared", "-fPIC", "-O1", "-std=c++20"]
        command = ["g++", *options, str(source), "-o", str(library), *includes, *libraries, "-lc10"]
        subprocess.run(command, check=True)
        torch.ops.load_library(library)


def _replace_torch_cuda():
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: H200.name,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "current_stream": lambda device=None: _Stream(),
        "is_bf16_supported": lambda *_, **__: True,
        "is_tf32_supported": lambda *_, **__: True,
        "memory_allocated": lambda *_, **__: 0,
        "mem_get_info": lambda *_, **__: (140 * 2**30, 141 * 2**30),
        "get_arch_list": lambda: ["sm_90"],
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)
    torch.version.cuda = "13.0"
    from torch._dynamo import device_interface

    interface = device_interface.CudaInterface
    for name in ("current_device", "set_device", "device_count", "synchronize",
                 "get_device_properties", "current_stream"):  # fmt: skip
        setattr(interface, name, staticmethod(replaced[name]))
    interface.exchange_device = staticmethod(replaced["_exchange_device"])
    interface.maybe_exchange_device = staticmethod(replaced["_maybe_exchange_device"])
    interface.get_raw_stream = staticmethod(lambda device: 0)
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)


def _replace_driver(triton):
    from triton.backends.compiler import GPUTarget

    properties = {
        "max_shared_mem": H200.shared_memory_per_block_optin,
        "max_num_regs": H200.regs_per_multiprocessor,
        "multiprocessor_count": H200.multi_processor_count,
        "warpSize": H200.warp_size,
        "sm_clock_rate": H200.clock_rate,
        "mem_clock_rate": H200.memory_clock_rate,
        "mem_bus_width": H200.memory_bus_width,
    }
    driver = types.SimpleNamespace(
        utils=types.SimpleNamespace(get_device_properties=lambda device=0: properties),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_benchmarker=lambda: lambda *_, **__: [1.0, 1.0, 1.0],
    )
    triton.runtime.driver.set_active(driver)


def _replace_inductor():
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers

    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    triton_helpers.set_driver_to_gpu = lambda: None
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"),
                         (misc_patterns, "_misc_patterns_init")):  # fmt: skip
        setattr(module, name, lambda *_, **__: None)  # they trace with real tensors on the device
