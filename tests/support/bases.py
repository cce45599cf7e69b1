"""Bases and adapters of given modules only, for tests of names and shapes.

Every value is exact in float32, as in ``support.layouts``.
"""

from support import layouts


def write_base(folder, shapes, *, dense=(), **config):
    """Write an INT4 checkpoint with modules of the given shapes; return their dense weights.

    Args:
        folder: the folder to make.
        shapes: (rows, columns) of each module.
        dense: the modules that are not packed.
        config: fields of config.json.
    """
    model = layouts.Model()
    for name, shape in shapes.items():
        if name in dense:
            model.plain(f"{name}.weight", *shape)
        else:
            model.packed(name, *shape, size=16)
    groups = {"group_0": layouts.group(group_size=16)}
    folder.mkdir()
    layouts.write_tensors(folder / "model.safetensors", model.stored)
    layouts.write_json(
        folder / "config.json",
        {
            "model_type": "llama",
            **config,
            "quantization_config": layouts.quantization(groups),
        },
    )
    return {name: model.dense[f"{name}.weight"].float() for name in shapes}


def write_lora(folder, shapes, **fields):
    """Write an adapter of the given shapes, with scaling 2; return its pairs by module."""
    return layouts.adapter(folder, shapes, **fields)[1]
