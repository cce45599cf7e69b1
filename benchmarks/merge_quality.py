"""Measure whether merging keeps what an adapter learned: ``python -m benchmarks.merge_quality``.

The script trains a byte-level Llama on Python's standard library, quantises it with
compressed-tensors, and trains an adapter on this project's pages. The table compares the losses on
a held-out part of the pages: of the dense model, of the INT4 model, of INT4 with the adapter in
float32, bfloat16 and INT4, and of the adapter merged to dense, to INT4 with min-max scales, and to
INT4 with searched scales. The error of the adapter in INT4 is that of B A, over all modules.
``--output NAME`` writes ``results/NAME.json`` and ``.md``.

Source: ``docs/owning-checkpoints.md``.
"""

import argparse
import dataclasses
import json
import math
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import machine
from int4_lora.integration import read_adapter
from int4_lora.integration.adapter.quantize import quantize_adapter
from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LIBRARY = ("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "difflib", "enum",
           "fractions", "inspect", "mailbox", "optparse", "pathlib", "pickle", "statistics",
           "subprocess", "tarfile", "textwrap", "turtle", "typing", "zipfile")  # fmt: skip
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LENGTH, BATCH = 128, 16
HELD_BACK = 0.1  # of each text


def texts():
    """Return the training and held-out bytes, of the library and of the pages."""
    folder = Path(sysconfig.get_path("stdlib"))
    library = b"".join((folder / f"{name}.py").read_bytes() for name in LIBRARY)
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/commands/*.md")])
    pages = b"".join(file.read_bytes() for file in files)
    return _split(library), _split(pages)


def _split(text):
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    last = int(len(tokens) * (1 - HELD_BACK))
    return tokens[:last], tokens[last:]


def train(model, tokens, steps, rate, seed):
    """Train the parameters that require gradients, on random pieces of a text."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def loss(model, tokens):
    """Return the mean loss over a whole text, in nats per byte."""
    count = len(tokens) // LENGTH
    pieces = tokens[: count * LENGTH].view(count, LENGTH)
    losses = [model(piece, labels=piece).loss.item() * len(piece) for piece in pieces.split(BATCH)]
    return sum(losses) / count


@torch.no_grad()
def adapted(model, modules):
    """Add the pairs of an adapter to the linears of a model, and return it.

    Args:
        model: a model of transformers.
        modules: the adapter's pairs, by the name of the linear.
    """
    for name, pair in modules.items():
        a, b = pair.a.float(), pair.b.float()

        def add(_, inputs, y, a=a, b=b, scaling=pair.scaling):
            return y + scaling * (inputs[0] @ a.T) @ b.T

        model.get_submodule(name).register_forward_hook(add)
    return model


def error_of_adapter(before, after):
    """Return |B' A' - B A| / |B A| over all modules, in Frobenius norms."""
    lost = norm = 0.0
    for name, pair in before.items():
        exact = pair.b.double() @ pair.a.double()
        quantised = after[name].b.double() @ after[name].a.double()
        lost += float((quantised - exact).square().sum())
        norm += float(exact.square().sum())
    return math.sqrt(lost / norm)


def measured(folder, steps, steps_of_lora):
    """Return the losses by name, and the reports of the errors of weights and adapters."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from int4_lora.integration.demo.recipe import save_quantised

    (library, _), (pages, held) = texts()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    train(model, library, steps, 3e-3, seed=1)
    losses = {"dense": loss(model, held)}
    save_quantised(model.to(torch.bfloat16), folder / "int4", WEIGHTS)
    unpack_checkpoint(folder / "int4", folder / "unpacked", dtype=torch.float32)

    def opened(name):
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    losses["INT4"] = loss(opened("unpacked"), held)
    tuned = get_peft_model(opened("unpacked"), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    train(tuned, pages, steps_of_lora, 3e-3, seed=2)
    tuned.save_pretrained(str(folder / "adapter"))
    both = PeftModel.from_pretrained(opened("unpacked"), folder / "adapter")
    losses["INT4 + LoRA"] = loss(both, held)
    reports = {}
    floats = read_adapter(folder / "adapter").modules
    narrow = {
        name: dataclasses.replace(pair, a=pair.a.bfloat16(), b=pair.b.bfloat16())
        for name, pair in floats.items()
    }
    quantised = quantize_adapter(folder / "adapter", folder / "adapter-int4").adapter.modules
    for name, pairs in (("bfloat16", narrow), ("INT4", quantised)):
        losses[f"INT4 + LoRA in {name}"] = loss(adapted(opened("unpacked"), pairs), held)
        error = error_of_adapter(floats, pairs)
        reports[f"INT4 + LoRA in {name}"] = {"relative_error": error}
    adapters = [(folder / "adapter", 1.0)]
    merge_checkpoint(folder / "int4", folder / "merged", adapters, dtype=torch.float32)
    losses["merged, dense"] = loss(opened("merged"), held)
    for name, search in (("merged, INT4, min-max", False), ("merged, INT4, scale search", True)):
        target = folder / name
        outcome = merge_checkpoint(
            folder / "int4", target, adapters, to="int4", search=search, max_error=1.0
        )
        reports[name] = outcome.report["total"]
        unpack_checkpoint(target, folder / f"{name}, dense", dtype=torch.float32)
        losses[name] = loss(opened(f"{name}, dense"), held)
    return losses, reports


def table(losses, reports):
    """Return the losses as a table in Markdown."""
    lines = ["| model | loss, nats per byte | relative error |", "|---|---|---|"]
    for name, value in losses.items():
        error = f"{reports[name]['relative_error']:.4f}" if name in reports else "-"
        lines.append(f"| {name} | {value:.4f} | {error} |")
    return "\n".join(lines)


def main(arguments=None):
    """Train, merge, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the base (400)")
    parser.add_argument("--steps-of-lora", type=int, default=200, help="of the adapter (200)")
    parser.add_argument("--output", help="write results/OUTPUT.json and .md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        losses, reports = measured(Path(folder), options.steps, options.steps_of_lora)
    print(table(losses, reports))
    if options.output:
        record = {"machine": machine("cpu"), "loss": losses, "merging": reports}
        file = RESULTS / f"{options.output}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(losses, reports) + "\n")


if __name__ == "__main__":
    sys.exit(main())
