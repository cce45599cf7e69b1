"""Spoil where a checkpoint's tensors lie, and find what a result then lacks.

Nothing here uses the project's own readers: files are read with the safetensors library.
"""

import json
import random
import shutil
from collections import Counter

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.conversion import bytes_of, run
from support.layouts import Model, adapter, quantization

INDEX = "model.safetensors.index.json"
PARTS = (".weight_packed", ".weight_scale", ".weight_shape")
MODULES = {"layers.0.q": (8, 64), "layers.0.k": (8, 64), "layers.1.q": (8, 64)}
COMMANDS = ("unpack", "dense", "int4", "verify", "annotate")


def make_base(folder):
    """Write a small checkpoint in shards; return its folder."""
    model = Model()
    model.plain("embed.weight", 8, 64)
    for name, shape in MODULES.items():
        model.packed(name, *shape)
        model.plain(f"{name}_norm.weight", 8)
    model.plain("lm_head.weight", 8, 64)
    return model.save(folder, quantization(), shards=3)


def spoil(folder, rng):
    """Change where one tensor lies or what it is called; return how, or None if nothing fits."""
    files = sorted(folder.glob("*.safetensors"))
    file, other = rng.choice(files), rng.choice(files)
    index = json.loads((folder / INDEX).read_text())
    weight_map, tensors = index["weight_map"], load_file(file)
    if not tensors:
        return None
    name = rng.choice(sorted(tensors))
    how = rng.choice([*sorted(SPOILERS), *HARMLESS, *HARMLESS])
    SPOILERS[how](folder, rng, file, other, tensors, name, weight_map)
    (folder / INDEX).write_text(json.dumps(index))
    return how


def spoil_several(folder, rng):
    """Spoil a folder up to three times; a damaged file is the last."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        done.append(spoil(folder, rng))
        if done[-1] == "damage_the_file":
            break
    return done


def _remove_from_file(folder, rng, file, other, tensors, name, weight_map):
    del tensors[name]
    save_file(tensors, file)


def _remove_from_index(folder, rng, file, other, tensors, name, weight_map):
    weight_map.pop(name, None)


def _remove_from_both(folder, rng, file, other, tensors, name, weight_map):
    _remove_from_file(folder, rng, file, other, tensors, name, weight_map)
    weight_map.pop(name, None)


def _rename_in_file(folder, rng, file, other, tensors, name, weight_map):
    tensors[_another_name(name, rng)] = tensors.pop(name)
    save_file(tensors, file)


def _rename_in_both(folder, rng, file, other, tensors, name, weight_map):
    new = _another_name(name, rng)
    tensors[new] = tensors.pop(name)
    save_file(tensors, file)
    weight_map.pop(name, None)
    weight_map[new] = file.name


def _rename_in_index(folder, rng, file, other, tensors, name, weight_map):
    if name in weight_map:
        weight_map[_another_name(name, rng)] = weight_map.pop(name)


def _move_in_files(folder, rng, file, other, tensors, name, weight_map):
    if other != file:
        save_file({**load_file(other), name: tensors.pop(name)}, other)
        save_file(tensors, file)


def _move_in_both(folder, rng, file, other, tensors, name, weight_map):
    _move_in_files(folder, rng, file, other, tensors, name, weight_map)
    weight_map[name] = other.name


def _move_in_index(folder, rng, file, other, tensors, name, weight_map):
    weight_map[name] = other.name


def _copy(folder, rng, file, other, tensors, name, weight_map):
    if other != file:
        save_file({**load_file(other), name: tensors[name] + 1}, other)


def _to_a_new_file(folder, rng, file, other, tensors, name, weight_map):
    new = rng.choice(["consolidated", "model", "model-00004-of-00004", "extra"])
    place = folder / f"{new}.safetensors"
    if not place.exists():
        save_file({name: tensors.pop(name)}, place)
        save_file(tensors, file)
        if rng.random() < 0.5:
            weight_map[name] = place.name


def _all_into_one(folder, rng, file, other, tensors, name, weight_map):
    joined = {one: tensor for each in folder.glob("*.safetensors")
              for one, tensor in load_file(each).items()}  # fmt: skip
    if rng.random() < 0.5:
        joined.pop(name, None)
    save_file(joined, folder / "model.safetensors")


def _rename_the_file(folder, rng, file, other, tensors, name, weight_map):
    file.rename(folder / f"renamed-{file.name}")


def _damage_the_file(folder, rng, file, other, tensors, name, weight_map):
    file.write_bytes(file.read_bytes()[:-1])


HARMLESS = ("move_in_both", "remove_from_both", "rename_in_both")  # unless a module loses a part
SPOILERS = {name.strip("_"): value for name, value in list(globals().items())
            if name.startswith("_") and callable(value)}  # fmt: skip


def _another_name(name, rng):
    module, _, part = name.rpartition(".")
    others = [f"{module}.{part}_x", f"other.{part}", f"{module}.weight", "x", f"{module}.bias"]
    return rng.choice(others)


def read_all(folder):
    """Return every tensor of every readable file at the top, and the names in several files."""
    found, count = {}, Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(file)
        except Exception:  # a damaged file: what it held is not known
            return found, {"a damaged file"}
        found |= tensors
        count.update(list(tensors))
    return found, {name for name, number in count.items() if number > 1}


def listed_only(folder, tensors):
    """Return the tensors that the model's own list names."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in weight_map.items()}


def dense_of(tensors):
    """Return what a dense checkpoint must hold: one weight for the parts of each module."""
    modules = {name.removesuffix(".weight_packed") for name in tensors
               if name.endswith(".weight_packed")}  # fmt: skip
    dense = {name: one for name, one in tensors.items()
             if not (name.endswith(PARTS) and name.rpartition(".")[0] in modules)}  # fmt: skip
    for name in modules:
        words = tensors[f"{name}.weight_packed"].numpy().view(np.uint32)
        codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(int) - 8
        scale = tensors[f"{name}.weight_scale"]
        spread = torch.from_numpy(codes.reshape(len(codes), -1)).to(scale.dtype)
        weight = spread * scale.repeat_interleave(spread.shape[1] // scale.shape[1], 1)
        assert f"{name}.weight" not in dense, "two weights of one module"
        dense[f"{name}.weight"] = weight
    return dense


def lost(expected, actual):
    """Return the names of tensors that are missing or changed."""
    return sorted(
        name
        for name, one in expected.items()
        if name not in actual
        or (actual[name].dtype, actual[name].shape) != (one.dtype, one.shape)
        or not torch.equal(actual[name], one)
    )


def run_trials(root, count, seed):
    """Run commands on spoilt checkpoints; return how often each ended how.

    Raises:
        AssertionError: a command succeeded although a tensor is missing, failed without a message,
            or changed something and failed.
    """
    base = make_base(root / "base")
    folder, _ = adapter(root / "lora", {"layers.0.q": (8, 64)})
    counts = Counter()
    for trial in range(count):
        rng = random.Random(f"{seed}/{trial}")
        source, target = root / f"s{trial}", root / f"t{trial}"
        shutil.copytree(base, source)
        how = spoil_several(source, rng)
        command, choice = rng.choice(COMMANDS), rng.choice([None, None, "take", "leave"])
        where = f"trial {trial}: {how}, {command}, {choice}"
        before = bytes_of(source)
        result = run(*_arguments(command, source, target, folder), *_option(choice))
        assert result.exit_code in (0, 1, 2), where
        assert result.exit_code == 0 or result.output.strip(), where
        counts[f"{command} {result.exit_code}"] += 1
        if result.exit_code:
            assert bytes_of(source) == before, where
            assert not target.exists(), where
        else:
            _check_nothing_lost(command, choice, source, target, result, where)
        for place in (source, target, target.with_name(f"{target.name}.partial")):
            shutil.rmtree(place, ignore_errors=True)
    return counts


def _arguments(command, source, target, folder):
    merge = ["merge", source, target, f"--adapter={folder}"]
    return {
        "unpack": ["unpack", source, target],
        "dense": merge,
        "int4": [*merge, "--to=int4", "--max-error=9"],
        "verify": ["verify", source, "--json"],
        "annotate": ["annotate", source],
    }[command]


def _option(choice):
    return [] if choice is None else [f"--unlisted={choice}"]


def _check_nothing_lost(command, choice, source, target, result, where):
    """Check that everything of the source is in what a command that succeeded made."""
    everything, repeated = read_all(source)
    if choice == "leave":
        everything = listed_only(source, everything)
    else:
        assert not repeated, f"{where}: {repeated}"
        index = json.loads((source / INDEX).read_text())["weight_map"]
        assert not index.keys() - everything.keys(), where
    modules = {name.rpartition(".")[0] for name in everything
               if name.endswith((".weight_packed", ".weight_scale"))}  # fmt: skip
    if command == "verify":
        assert {one["name"] for one in json.loads(result.stdout)["modules"]} == modules, where
    elif command == "annotate":
        described = json.loads((source / "lora_metadata.json").read_text())["modules"]
        assert described.keys() == modules, where
    else:
        actual, repeated = read_all(target)
        assert not repeated, where
        merged = {"layers.0.q.weight", *(f"layers.0.q{part}" for part in PARTS[:2])}
        expected = everything if command == "int4" else dense_of(everything)
        changed = merged if command != "unpack" else set()
        missing = lost({name: one for name, one in expected.items() if name not in changed}, actual)
        assert not missing, f"{where}: {missing}"
        assert expected.keys() == actual.keys(), where
