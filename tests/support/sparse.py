"""A sharded INT4 checkpoint of any size that takes no disk: sparse files with real headers."""

import json

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"}
CONFIG = {
    "model_type": "llama",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": GROUP},
        "ignore": ["lm_head"],
    },
}


def make_sparse(folder, *, layers, size):
    """Write a model of ``layers`` layers of seven ``size`` x ``size`` modules; return its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map, total = {}, 0
    for layer in range(layers):
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        header, at, shapes = {}, 0, []
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            module = f"model.layers.{layer}.{part}_proj"
            for name, dtype, shape, nbytes in (
                ("weight_packed", "I32", [size, size // 8], size * size // 2),
                ("weight_scale", "BF16", [size, size // 128], size * size // 64),
                ("weight_shape", "I64", [2], 16),
            ):
                full = f"{module}.{name}"
                header[full] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
                weight_map[full] = shard
                if name == "weight_shape":
                    shapes.append(at)
                at += nbytes
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
            for place in shapes:
                file.seek(8 + len(text) + place)
                file.write(size.to_bytes(8, "little") * 2)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
