"""Tiny FP4 Llamas, quantised by min-max and written by compressed-tensors."""

from support.tiny import LLAMA

PRESETS = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
MERGED = {  # the modules that engines merge, by what they are merged into
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def make_float4(folder, name, llama=LLAMA, *, shared=False):
    """Make a model of a format, and return its folder.

    Args:
        folder: where to write it.
        name: "nvfp4" or "mxfp4".
        llama: arguments of transformers' LlamaConfig.
        shared: whether modules that engines merge share their global scale, as llm-compressor
            writes them.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    from int4_lora.integration.demo import recipe

    model = recipe._dense_model(llama)
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    quantised = {
        path: module
        for path, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    largest = {}
    for path, module in quantised.items():
        key = _merged(path) if shared else path
        largest[key] = max(largest.get(key, 0.0), module.weight.data.float().abs().max())
    for path, module in quantised.items():
        args, weight = module.quantization_scheme.weights, module.weight.data.float()
        over = None
        if hasattr(module, "weight_global_scale"):
            amax = largest[_merged(path) if shared else path]
            over = generate_gparam(-amax, amax)
            module.weight_global_scale.data.copy_(over)
        groups = weight.reshape(len(weight), -1, args.group_size)
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, over)
        module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(str(folder))
    compressor.update_config(str(folder))
    return folder


def _merged(path):
    parent, _, last = path.rpartition(".")
    return f"{parent}.{MERGED.get(last, last)}"
