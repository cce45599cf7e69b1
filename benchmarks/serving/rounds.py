"""Takes turns: every engine with every workload once a round, in an order shuffled anew.

An engine whose turn it is not is stopped: waiting, it would use 1 to 3 % of a processor, for
threads of its communication library that look for work a hundred times a second.

Source: the rules of ``benchmarks/results/README.md``.
"""

import os
import random
import time
from pathlib import Path

from benchmarks.child import Child
from benchmarks.serving.workloads import measures

STOCK, OURS, WITHOUT = "stock", "ours", "stock without LoRA"
BEFORE = "ours before"  # an earlier version, from an environment of its own
ENGINES = (STOCK, OURS, WITHOUT)
FIRST_REQUESTS = 10
FIRST = {"rows": 1, "prompt": 64, "new": 8}  # each of another adapter, so that each loads one
SETTLE = 0.05  # seconds from when an engine may go on to its run
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, a part of every engine's memory
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process an engine, which can be stopped
}


def arguments_of(name, options):
    """Return what an engine gives vLLM's ``LLM``."""
    shared = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 1024,  # a whole prefill in one step
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if name == WITHOUT:
        return shared
    lora = {
        "enable_lora": True,
        "max_loras": options.max_loras,
        "max_cpu_loras": 16,
        "max_lora_rank": 16,
    }
    if name == STOCK:
        return {**shared, **lora}
    own = {"int4_lora": {"backend": options.backend}}
    return {**shared, **lora, "quantization": "int4_lora", "additional_config": own}


def environment_of(folder):
    """Return the variables of an engine, where the user has not set them.

    What ``auto`` measures is kept beside the logs: it is measured in this run, and what a benchmark
    found beside other work is not what the user's engines choose by.
    """
    own = {**ENVIRONMENT, "INT4_LORA_CACHE": str(folder / "cache")}
    return {name: os.environ.get(name, value) for name, value in own.items()}


class Turns:
    """The engines, and what is known of them.

    Args:
        folder: for the logs.
        say: called with a line whenever something is done.
    """

    def __init__(self, folder, say):
        self._folder, self._say = Path(folder), say
        self.children, self.engines = {}, {}
        self._idle = {}  # by engine, processor seconds while others ran, and for how long they did

    def load(self, name, files, arguments, python=None):
        """Start an engine, and ask its first requests: each brings an adapter that is new to it."""
        log = self._folder / f"{name.replace(' ', '-')}.log"
        environment = environment_of(self._folder)
        self.children[name] = child = Child("benchmarks.serving.engine", log, environment, python)
        adapters = [str(folder) for folder in files.adapters]
        found = child.ask("load", model=str(files.model), adapters=adapters, arguments=arguments)
        lora = arguments.get("enable_lora", False)
        first = []
        for number in range(FIRST_REQUESTS):
            answer = child.ask("run", **FIRST, adapters=[number if lora else None])
            first.append(answer["times"][0][-1])
        self.engines[name] = {
            **found,
            "arguments": arguments,
            "first_requests": first,
            "said": lines_about_us(log.read_text(encoding="utf-8", errors="replace")),
        }
        child.pause()
        self._say(f"{name}: loaded in {found['load_seconds']:.0f} s")

    def run(self, workloads, rounds, seed=0):
        """Run everything once unmeasured and then in rounds.

        Args:
            workloads: those with adapters are left out where LoRA is not enabled.
            rounds: how many.
            seed: of the shuffling.

        Returns:
            A list of what was found, one entry for each engine and workload.
        """
        found = {
            (name, workload): {"engine": name, "workload": workload, "rounds": []}
            for name in self.children
            for workload in workloads
            if workload.mix == "base" or self.engines[name]["arguments"].get("enable_lora")
        }
        order, rng = list(found), random.Random(seed)
        for number in range(rounds + 1):
            rng.shuffle(order)
            for name, workload in order:
                answer = self._one(name, workload)
                measured = measures(workload, answer["times"])
                entry = found[name, workload]
                if number:
                    entry["rounds"].append(measured)
                else:
                    entry |= {"cold": measured, "tokens": answer["tokens"]}
            self._say(f"round {number} of {rounds} done")
        return list(found.values())

    def note(self):
        """Note what the engines have held, and used while others ran."""
        for name, child in self.children.items():
            child.resume()
            self.engines[name]["serving_bytes"] = child.ask("memory")
            child.pause()
            used, passed = self._idle.get(name, (0.0, 0.0))
            self.engines[name]["idle_share"] = used / passed if passed else None

    def close(self):
        """End the engines."""
        for child in self.children.values():
            child.close()

    def _one(self, name, workload):
        self.children[name].resume()
        time.sleep(SETTLE)
        idle = {other: child for other, child in self.children.items() if other != name}
        before = {other: child.cpu_seconds() for other, child in idle.items()}
        started = time.perf_counter()
        answer = self.children[name].ask(
            "run",
            rows=workload.rows,
            prompt=workload.prompt,
            new=workload.new,
            adapters=workload.adapters,
        )
        passed = time.perf_counter() - started
        self.children[name].pause()
        for other, start in before.items():
            if start is not None:
                used, long = self._idle.get(other, (0.0, 0.0))
                now = idle[other].cpu_seconds()
                self._idle[other] = (used + now - start, long + passed)
        return answer


def lines_about_us(log):
    """Return what the plug-in logged, without times."""
    lines = [line.partition("int4_lora: ")[2] for line in log.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))
