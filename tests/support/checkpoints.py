"""Checkpoints changed by hand: configs, tensors and shards."""

import json

from safetensors.torch import load_file, save_file

Q_PROJ = "model.layers.0.self_attn.q_proj"


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config, config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """Replace tensors of q_proj; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, change in changes.items():
        name = f"{Q_PROJ}.{part}"
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, file)


def shard(folder, parts=3):
    """Split model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = dict(sorted(tensors.items())[part::parts])
        save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def weights(**changes):
    return lambda _, q: q["config_groups"]["group_0"]["weights"].update(changes)
