"""Load one of the contenders in a process; run forwards, training steps and ``generate`` with it.

- dense: the dense twin.
- decompressed: the INT4 checkpoint, which transformers makes dense in its first forward. PEFT needs
  that forward before it, so ``adapt`` runs it.
- ours: the INT4 checkpoint, kept packed by ``load_packed``.

Everything that a contender uses is imported before its memory is first read, transformers' lazy
imports included.
"""

import copy
import itertools
import sys
import time

from benchmarks.child import forget_the_peak, memory_bytes, serve

DENSE, DECOMPRESSED, OURS = "dense", "decompressed", "ours"
CONTENDERS = (DENSE, DECOMPRESSED, OURS)
RANK = 16
LEARNING_RATE = 1e-4


class Contender:
    """The commands and their state."""

    def __init__(self):
        self._load = self._name = self._plain = self._adapted = self._optimizer = None

    def imports(self, name):
        """Import what a contender needs.

        Args:
            name: one of ``CONTENDERS``.

        Returns:
            The memory afterwards, and the number of threads.
        """
        import peft  # noqa: F401
        import torch
        from transformers import LlamaForCausalLM

        self._name, self._load = name, LlamaForCausalLM.from_pretrained
        if name != DENSE:
            import compressed_tensors  # noqa: F401
        if name == OURS:
            import torch._inductor.compile_fx

            from int4_lora.integration.huggingface import load_packed

            self._load = load_packed
        return {"memory": memory_bytes(), "threads": torch.get_num_threads()}

    def load(self, folder):
        """Load the model, without adapters.

        Returns:
            The seconds, the bytes of the model's tensors, and the memory afterwards.
        """
        import torch

        from benchmarks.finetune.accounting import held_bytes

        forget_the_peak()
        started = time.perf_counter()
        self._plain = self._load(folder, dtype=torch.bfloat16)
        seconds = time.perf_counter() - started
        self._plain.eval()
        return {"seconds": seconds, "held": held_bytes(self._plain), "memory": memory_bytes()}

    def forward(self, rows, length):
        """Return the seconds of a forward without gradients."""
        import torch

        ids = self._tokens(rows, length)
        with torch.no_grad():
            started = time.perf_counter()
            self._plain(ids)
            return {"seconds": time.perf_counter() - started}

    def adapt(self):
        """Add an adapter with PEFT on all linear layers, and an optimizer for it.

        The model without adapters stays beside it and shares its tensors.
        """
        import peft
        import torch

        if self._name == DECOMPRESSED:
            self.forward(1, 1)
        shared = {id(tensor): tensor for tensor in _tensors(self._plain)}
        base = copy.deepcopy(self._plain, shared)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self._adapted = peft.get_peft_model(base, config)
        trained = [tensor for tensor in self._adapted.parameters() if tensor.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        return {"trained": sum(tensor.numel() for tensor in trained)}

    def step(self, rows, length, checkpointing):
        """Train the adapter for a step.

        Args:
            rows: the number of sequences.
            length: the tokens of each.
            checkpointing: whether to compute activations again in the backward.

        Returns:
            The seconds of the forward, the backward, the optimizer's update and all of it; the
            loss; the peak memory of the step, and whether it was counted from the step's start.
        """
        model = self._adapted
        _checkpoint(model, checkpointing)
        ids = self._tokens(rows, length)
        model.train()
        resets = forget_the_peak()
        times = [time.perf_counter()]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._optimizer.step()
        self._optimizer.zero_grad()
        times.append(time.perf_counter())
        model.eval()
        forward, backward, update = (stop - start for start, stop in itertools.pairwise(times))
        return {
            "seconds": times[-1] - times[0],
            "forward": forward,
            "backward": backward,
            "update": update,
            "loss": loss.item(),
            "peak": memory_bytes()["peak"],
            "resets": resets,
        }

    def generate(self, prompt, new, adapter):
        """Generate greedily for a single prompt.

        Args:
            prompt: the tokens of the prompt.
            new: the tokens to generate.
            adapter: whether to use the model with the adapter.

        Returns:
            The seconds, and the number of new tokens for each of them.
        """
        import torch

        model = self._adapted if adapter else self._plain
        ids = self._tokens(1, prompt)
        started = time.perf_counter()
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        if made.shape != (1, prompt + new):
            raise ValueError(f"{new} new tokens were asked, got {made.shape[1] - prompt}")
        return {"seconds": seconds, "tokens_per_second": new / seconds}

    def _tokens(self, rows, length):
        """Return the same random tokens in every call and process."""
        import torch

        generator = torch.Generator().manual_seed(0)
        vocabulary = self._plain.config.vocab_size
        return torch.randint(3, vocabulary, (rows, length), generator=generator)


def counted(command):
    """Return a command whose answer also has the number of graphs that torch compiled in it."""

    def call(**arguments):
        before = _graphs()
        answer = command(**arguments)
        return {**answer, "graphs": _graphs() - before}

    return call


def _graphs():
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _checkpoint(model, enabled):
    """Turn gradient checkpointing on or off; transformers 5.23 has another name for it."""
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{named}_checkpointing_disable")()


def _tensors(model):
    yield from model.parameters()
    yield from model.buffers()


if __name__ == "__main__":
    contender = Contender()
    commands = ("imports", "load", "forward", "adapt", "step", "generate")
    serve({name: counted(getattr(contender, name)) for name in commands})
