"""Run fresh processes, one at a time: load, then the first forwards or the first training steps.

Only ours compiles graphs. So each of its runs is two processes: the first begins with an empty
cache on disk ("cold"), the second with the first's cache ("cached").

Processes that train return freed memory to the system at once, so that their peak is what they use.
With glibc's defaults about half of a contender's peak, dense or not, was free memory in pieces, and
the peak varied by a tenth between runs of the same code.

Source: ``benchmarks/results/README.md``.
"""

from pathlib import Path

from benchmarks.child import Child
from benchmarks.finetune.contender import CONTENDERS, DECOMPRESSED, DENSE, OURS
from benchmarks.finetune.workloads import TIMES, TRAINING
from benchmarks.turns import shuffled

COLD, CACHED, FRESH = "cold", "cached", "fresh"
STATES = {OURS: (COLD, CACHED)}
MAPPED = {  # of glibc's malloc: map blocks of 1 MiB and more, which go back when they are freed
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
}
MODULE = "benchmarks.finetune.contender"


def environment_of(caches, threads):
    """Return the environment variables of a contender.

    Args:
        caches: the folder in which torch and int4_lora cache.
        threads: the threads of the process.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "INT4_LORA_CACHE": str(caches / "int4-lora"),
        "HF_HUB_OFFLINE": "1",
    }


def checkpoint_of(name, files):
    """Return the checkpoint's folder of a contender."""
    return str(files.dense if name == DENSE else files.int4)


def caches_of(folder, number, name, workload):
    """Return the folder of the caches of a contender's processes for a workload in a round."""
    return Path(folder) / f"start-{number}-{name}-{workload}"


def start(child, name, workload, files, sizes):
    """Run a workload in a fresh process.

    Args:
        child: the process.
        name: the contender.
        workload: a workload of ``TIMES``.
        files: the checkpoints.
        sizes: the sizes of a batch.

    Returns:
        The answers of the process to the commands ``imports`` and ``load``, and to each of the
        workload's.
    """
    facts = {
        "imports": child.ask("imports", name=name),
        "load": child.ask("load", folder=checkpoint_of(name, files)),
    }
    if workload == TRAINING:
        facts["adapt"] = child.ask("adapt")
    command, arguments = sizes.of_start(workload)
    return {**facts, "times": [child.ask(command, **arguments) for _ in range(TIMES[workload])]}


def starts(files, sizes, folder, *, workloads, rounds, threads, seed, say):
    """Run every workload in fresh processes of every contender, in a new random order per round.

    The decompressed contender runs in the first round only: its first forward takes a minute, and
    no bar depends on it.

    Args:
        files: the checkpoints.
        sizes: the sizes of a batch.
        folder: for logs and caches.
        workloads: the workloads, of ``TIMES``.
        rounds: the number of rounds.
        threads: the threads of a process.
        seed: of the random order.
        say: called with each line of progress.

    Returns:
        A list of dicts, one for each process.
    """
    results = []
    keys = [(name, workload) for name in CONTENDERS for workload in workloads]
    for number, order in shuffled(keys, rounds - 1, seed):
        for name, workload in order:
            if number and name == DECOMPRESSED:
                continue
            caches = caches_of(folder, number, name, workload)
            for state in STATES.get(name, (FRESH,)):
                environment = environment_of(caches, threads)
                if workload == TRAINING:
                    environment |= MAPPED
                child = Child(MODULE, f"{caches}-{state}.log", environment)
                try:
                    facts = start(child, name, workload, files, sizes)
                finally:
                    child.close()
                results.append({"contender": name, "workload": workload, "state": state, **facts})
        say(f"fresh processes: round {number + 1} of {rounds} done")
    return results
