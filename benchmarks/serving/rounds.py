"""Run every workload on every engine once per round, in a new random order.

Source: ``benchmarks/results/README.md``.
"""

import os
import re
from pathlib import Path

from benchmarks import turns
from benchmarks.child import Child
from benchmarks.serving.workloads import measures

STOCK, OURS, WITHOUT = "stock", "ours", "stock without LoRA"
BEFORE = "ours before"  # an earlier version, from a separate environment
ENGINES = (STOCK, OURS, WITHOUT)
FIRST_REQUESTS = 10
FIRST = {"rows": 1, "prompt": 64, "new": 8}  # each request loads another adapter
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, for each engine
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process per engine, which SIGSTOP can stop
}


def arguments_of(name, options):
    """Return the arguments of an engine's ``LLM``."""
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
    plugin = {"int4_lora": {"backend": options.backend}}
    return {**shared, **lora, "quantization": "int4_lora", "additional_config": plugin}


def environment_of(folder):
    """Return the environment variables of an engine; variables that the user has set are kept.

    Times of ``auto`` and graphs are cached beside the logs, so that this run makes them and the
    user's engines do not use them.
    """
    defaults = {
        **ENVIRONMENT,
        "INT4_LORA_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


class Turns(turns.Turns):
    """The engines, and the facts about them.

    Args:
        folder: the folder for the logs.
        say: called with each line of progress.
    """

    def __init__(self, folder, say):
        super().__init__()
        self._folder, self._say = Path(folder), say
        self.engines = {}

    def load(self, name, files, arguments, python=None):
        """Start an engine twice, and keep the second.

        The first start finds no times and no graphs on the disk, the second those of the first.
        Each runs first requests, with an adapter not yet loaded in each.
        """
        cold = self._start(name, files, arguments, python)
        self.children.pop(name).close()
        warm = self._start(name, files, arguments, python)
        self.engines[name] = {
            **warm,
            "arguments": arguments,
            "cold": cold,
            "log": lines_about_us(self._log(name).read_text(encoding="utf-8", errors="replace")),
        }
        self.children[name].pause()
        self._say(
            f"{name}: loaded in {cold['load_seconds']:.1f} s, again in {warm['load_seconds']:.1f} s"
        )

    def _start(self, name, files, arguments, python):
        """Start an engine, run its first requests, and return the facts."""
        environment = environment_of(self._folder)
        self.children[name] = child = Child(
            "benchmarks.serving.engine", self._log(name), environment, python
        )
        adapters = [str(folder) for folder in files.adapters]
        facts = child.ask("load", model=str(files.model), adapters=adapters, arguments=arguments)
        lora = arguments.get("enable_lora", False)
        first = []
        for number in range(FIRST_REQUESTS):
            answer = child.ask("run", **FIRST, adapters=[number if lora else None])
            first.append(answer["times"][0][-1])
        return {**facts, "first_requests": first}

    def _log(self, name):
        return self._folder / f"{name.replace(' ', '-')}.log"

    def run(self, workloads, rounds, seed=0):
        """Run every workload once unmeasured, then once in each round.

        Args:
            workloads: the workloads; engines without LoRA skip those with adapters.
            rounds: the number of rounds.
            seed: the seed of the random order.

        Returns:
            A list of dicts, one for each engine and workload.
        """
        runs = {
            (name, workload): {"engine": name, "workload": workload, "rounds": []}
            for name in self.children
            for workload in workloads
            if not workload.uses_adapters or self.engines[name]["arguments"].get("enable_lora")
        }
        for number, order in turns.shuffled(runs, rounds, seed):
            for name, workload in order:
                answer = self.ask(
                    name,
                    "run",
                    rows=workload.rows,
                    prompt=workload.prompt,
                    new=workload.new,
                    adapters=workload.adapters,
                    at_a_time=workload.at_a_time,
                )
                measured = measures(workload, answer["times"])
                run = runs[name, workload]
                if number:
                    run["rounds"].append(measured)
                else:
                    run |= {"cold": measured, "tokens": answer["tokens"]}
            self._say(f"round {number} of {rounds} done")
        return list(runs.values())

    def note(self):
        """Record each engine's memory, and its CPU time while other engines ran."""
        for name, child in self.children.items():
            child.resume()
            self.engines[name]["serving_bytes"] = child.ask("memory")
            child.pause()
            self.engines[name]["idle_share"] = self.idle_share(name)


def lines_about_us(log):
    """Return the plug-in's lines from a log, without their times and this machine's folders."""
    lines = [line.partition("int4_lora: ")[2] for line in log.splitlines()]
    lines = [re.sub(r"(?<= from )/\S*/", "", line) for line in lines]
    return list(dict.fromkeys(line for line in lines if line))
