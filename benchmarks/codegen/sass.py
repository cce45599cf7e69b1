"""Compile a generated kernel for sm_90, and count the instructions of its machine code.

Source: NVIDIA's ``cuobjdump`` and ``nvdisasm``, which Triton's package contains.
"""

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """The machine code of one kernel for one launch configuration.

    Args:
        launch: the tile sizes, "num_warps" and "num_stages".
        registers: the registers of a thread.
        spilled: the bytes of a thread's registers that are spilled to memory.
        shared: the bytes of shared memory of a block.
        loop: the opcodes of the longest loop, in order, or of the whole kernel if it has no loop.
        loops: whether the kernel has a loop.
    """

    launch: dict
    registers: int
    spilled: int
    shared: int
    loop: list
    loops: bool

    @property
    def threads(self):
        """Threads of a block."""
        return 32 * self.launch["num_warps"]

    def instructions_per(self, items):
        """Return a thread's loop instructions per item, for a block that processes ``items``."""
        return len(self.loop) * self.threads / items


def compile_kernel(source):
    """Return the machine code of a kernel for each of its launch configurations."""
    module = _load(source)
    name = re.search(r"^def (\w+)\(", source, re.M).group(1)
    tuner = getattr(module, name)
    return [_compile(tuner, config) for config in tuner.configs]


def _compile(tuner, config):
    meta = tuner._create_compile_meta(config)
    program = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = tuner._create_compile_options(config, meta)
    compiled = triton.compile(program, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    opcodes, loops = _hot_loop(text)
    launch = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return Machine(launch, int(registers), int(stack), compiled.metadata.shared, opcodes, loops)


def _tool(name, *arguments):
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _load(source):
    """Import a kernel's source, as Inductor imports it from its cache."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / "int4-lora-codegen"
    folder.mkdir(exist_ok=True)
    file = folder / f"k{digest}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hot_loop(text):
    """Return the opcodes of the longest loop, or all if there is no loop, and whether there is."""
    labels, opcodes, best = {}, [], (0, 0)
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x?_?\w+):", line)
        if label:
            labels[label.group(1)] = len(opcodes)
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*)", line)
        if not found:
            continue
        opcodes.append(found.group(1))
        target = re.search(r"`\((\.L_x?_?\w+)\)", found.group(2))
        if found.group(1).startswith("BRA") and target and target.group(1) in labels:
            start = labels[target.group(1)]
            if len(opcodes) - start > max(3, best[1] - best[0]):  # not the final jump to itself
                best = (start, len(opcodes))
    return (opcodes[slice(*best)], True) if best[1] else (opcodes, False)
