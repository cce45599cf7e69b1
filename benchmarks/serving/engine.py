"""Run one vLLM engine in a process that loads the model once, then answers ``run`` commands.

A run adds all requests to the engine at once and steps the engine, so that the time of every token
is known. Between two commands the process is idle.

Source: vLLM's ``LLMEngine.add_request`` and ``step``, which ``LLM.generate`` consists of.
"""

import os
import random
import time

from benchmarks.child import forget_the_peak, memory_bytes, serve
from int4_lora.integration.demo.engine import stepped


class Engine:
    """The commands and their state."""

    def __init__(self):
        self._llm, self._adapters, self._vocabulary, self._asked = None, [], 0, 0

    def load(self, model, adapters, arguments):
        """Start the engine.

        Args:
            model: the checkpoint's folder.
            adapters: the folder of each adapter; ignored if LoRA is off.
            arguments: the arguments of vLLM's ``LLM``.
        """
        started = time.perf_counter()
        import torch
        from vllm import LLM

        self._llm = LLM(model, **arguments)
        if arguments.get("enable_lora"):
            from vllm.lora.request import LoRARequest

            self._adapters = [
                LoRARequest(os.path.basename(folder), number, folder)
                for number, folder in enumerate(adapters, start=1)
            ]
        self._vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        facts = {
            "load_seconds": time.perf_counter() - started,
            "load_bytes": memory_bytes(),
            "threads": torch.get_num_threads(),
            "load_graphs": graphs(),
        }
        return {**facts, "peak_starts_again": forget_the_peak()}

    def run(self, rows, prompt, new, adapters, at_a_time=None):
        """Run requests that arrive at the same time, or a few at a time.

        Args:
            rows: the number of requests.
            prompt: the length of each prompt in tokens; the tokens are the same in every run.
            new: the number of tokens to generate for each request.
            adapters: the number of each row's adapter, or None.
            at_a_time: the number of rows that arrive together, all by default; the next rows
                arrive when these have ended.

        Returns:
            For each row, the seconds from the start of the first row to each token, and the tokens.
        """
        given = [self._prompt(row, prompt) for row in range(rows)]
        requests = [None if adapter is None else self._adapters[adapter] for adapter in adapters]
        asked, times, tokens, passed = self._sampling(new), [], [], 0.0
        for start in range(0, rows, at_a_time or rows):
            part = slice(start, start + (at_a_time or rows))
            self._asked += 1
            some = stepped(self._llm, str(self._asked), given[part], requests[part], asked)
            times += [[passed + seconds for seconds in row] for row in some[0]]
            tokens += some[1]
            passed = max(row[-1] for row in times)
        return {"times": times, "tokens": tokens}

    def memory(self):
        """Return the process's memory, its peak since the load, and its number of graphs."""
        return {**memory_bytes(), "graphs": graphs()}

    def _prompt(self, row, length):
        drawn = random.Random(row)
        return [drawn.randrange(3, self._vocabulary) for _ in range(length)]

    def _sampling(self, new):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=new,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def graphs():
    """Return the number of graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    engine = Engine()
    serve({"load": engine.load, "run": engine.run, "memory": engine.memory})
