"""int4-lora merge: dense to the last bit, INT4 with the error it reports, and what it refuses."""

import json
import shutil

import pytest
import torch
from conversion.test_unpack import bytes_of, tensors_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from int4_lora.integration import cli, open_checkpoint, read_adapter
from int4_lora.reference import dequantize
from int4_lora.reference.rounding import round_once
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard
from support.tiny import LLAMA, VARIANTS


def run(*arguments):
    return CliRunner().invoke(cli.app, ["merge", *map(str, arguments)])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    from int4_lora.integration.demo import recipe

    root = tmp_path_factory.mktemp("merged-adapters")
    for name, targets in (("all", "all-linear"), ("some", ["q_proj", "down_proj", "lm_head"])):
        settings = {"r": 5, "lora_alpha": 2, "target_modules": targets}
        recipe.make_adapter(root / name, LLAMA, name, settings)
    return [root / "all", root / "some"]


def exact_weights(source, adapters, factors):
    """Return W + sum of weight * scaling * B A of every changed weight, in float64."""
    checkpoint, found = open_checkpoint(source), {}
    for folder, factor in zip(adapters, factors, strict=True):
        for name, module in read_adapter(folder).modules.items():
            full = f"{name}.weight"
            if full not in found and name in checkpoint.schemes:
                found[full] = dequantize(checkpoint.packed_weight(name), torch.float64)
            elif full not in found:
                found[full] = checkpoint.tensor(full).double()
            found[full] += factor * module.scaling * (module.b.double() @ module.a.double())
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_is_the_exact_sum_rounded_once(tiny_models, adapters, tmp_path, variant):
    source = tiny_models[variant]
    before = bytes_of(source)
    options = [f"--adapter={adapters[0]}", f"--adapter={adapters[1]}=-0.25"]
    result = run(source, tmp_path / "merged", *options)
    assert result.exit_code == 0, result.output
    found, exact = tensors_of(tmp_path / "merged"), exact_weights(source, adapters, (1, -0.25))
    for name, expected in exact.items():
        off = found[name].double() - expected
        half = (torch.nextafter(found[name], found[name] * 2).double() - found[name].double()) / 2
        assert (off.abs() <= half.abs() * (1 + 1e-6)).all(), name
        same = found[name] == round_once(expected, torch.bfloat16)
        assert same.float().mean() > 0.999  # float64 sums in another order may round a tie
    assert "model.embed_tokens.weight" in found
    assert bytes_of(source) == before


def test_dense_gives_the_logits_of_base_and_adapter(tiny_models, adapters, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, merged, dense = tiny_models["g32"], tmp_path / "merged", tmp_path / "dense"
    assert run(source, merged, f"--adapter={adapters[0]}").exit_code == 0
    command = ["unpack", str(source), str(dense), "--dtype", "float32"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    tokens = torch.arange(24).view(2, 12)

    def logits(folder, dtype, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).to(dtype)
        with torch.no_grad():
            return model(tokens).logits.double()

    truth = logits(dense, torch.float64, adapters[0])
    theirs = (logits(dense, torch.bfloat16, adapters[0]) - truth).abs().max()
    ours = (logits(merged, torch.bfloat16) - truth).abs().max()
    assert ours <= 2 * theirs + 0.02
    assert (logits(dense, torch.float64) - truth).abs().max() > 5 * ours  # the adapter shows


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_reports_the_error_that_running_it_shows(tiny_models, adapters, tmp_path, variant):
    source, target = tiny_models[variant], tmp_path / "merged"
    options = [f"--adapter={adapters[0]}", f"--adapter={adapters[1]}=0.5", "--to=int4"]
    result = run(source, target, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads((target / "merge_report.json").read_text())
    assert json.loads(result.stdout)["report"] == report
    exact, merged = exact_weights(source, adapters, (1, 0.5)), open_checkpoint(target)
    assert {one["module"] for one in report["modules"]} == set(merged.modules())
    errors, norms = [], []
    for one in report["modules"]:
        expected = exact[f"{one['module']}.weight"]
        weight = merged.packed_weight(one["module"])
        identity = torch.eye(weight.in_features, dtype=torch.float64)
        y = identity @ dequantize(weight, torch.float64).T  # what running it on one-hot x gives
        errors.append(float((y - expected.T).square().sum()))
        norms.append(float(expected.square().sum()))
        relative = (errors[-1] / norms[-1]) ** 0.5
        assert one["relative_error"] == pytest.approx(relative, rel=1e-9)
        assert one["max_error"] == pytest.approx(float((y - expected.T).abs().max()), rel=1e-9)
        assert one["relative_error"] < one["relative_error_minmax"]
    total = (sum(errors) / sum(norms)) ** 0.5
    assert report["total"]["relative_error"] == pytest.approx(total, rel=1e-9)
    worst = sorted(report["modules"], key=lambda one: -one["relative_error"])[:5]
    assert report["worst"] == [one["module"] for one in worst]
    head = tensors_of(target)["lm_head.weight"]
    assert torch.equal(head, round_once(exact["lm_head.weight"], head.dtype))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert [one["name"] for one in report["adapters"]] == ["all", "some"]
    assert report["scales"] == "search"


@pytest.mark.parametrize("variant", ["g128", "asym-g32", "channel", "asym-channel"])
def test_no_worse_than_upstreams_quantiser(tiny_models, adapters, tmp_path, variant):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    source = tiny_models[variant]
    for scales in ("search", "minmax"):
        options = [f"--adapter={adapters[0]}", "--to=int4", f"--scales={scales}"]
        assert run(source, tmp_path / scales, *options).exit_code == 0
    exact = exact_weights(source, adapters[:1], [1.0])
    lost = {"search": 0.0, "minmax": 0.0, "theirs": 0.0}
    for name, expected in exact.items():
        module = name.removesuffix(".weight")
        scheme = open_checkpoint(source).schemes.get(module)
        if scheme is None:
            continue
        arguments, dense = scheme.upstream.weights, expected.bfloat16()
        groups = dense.unflatten(1, (-1, arguments.group_size or dense.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        theirs = fake_quantize(dense, scale.bfloat16(), zero, arguments)
        lost["theirs"] += float((theirs.double() - expected).square().sum())
        for scales in ("search", "minmax"):
            weight = open_checkpoint(tmp_path / scales).packed_weight(module)
            off = dequantize(weight, torch.float64) - expected
            lost[scales] += float(off.square().sum())
    assert lost["minmax"] <= lost["theirs"] * 1.001
    assert lost["search"] <= 0.95 * lost["theirs"]


def test_untouched_modules_stay_as_they_are(tiny_models, adapters, tmp_path):
    source = tiny_models["asym-g32"]
    options = [f"--adapter={adapters[1]}", "--to=int4"]
    assert run(source, tmp_path / "merged", *options).exit_code == 0
    before, after = tensors_of(source), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    assert parts == {"q_proj", "down_proj", "lm_head"}
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_an_error_above_the_bar_is_refused_and_accepted_when_told(tiny_models, adapters, tmp_path):
    target, options = tmp_path / "merged", [f"--adapter={adapters[0]}", "--to=int4"]
    result = run(tiny_models["g128"], target, *options, "--max-error=0.01", "--json")
    assert result.exit_code == 1
    assert "14 of 14 modules" in result.stderr
    assert json.loads(result.stdout)["report"]["total"]["relative_error"] > 0.01
    assert not target.exists()
    result = run(tiny_models["g128"], target, *options, "--max-error=0.5", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["written"] == []  # it was computed before
    assert run(tiny_models["g128"], tmp_path / "a", *options, "--max-error=nan").exit_code == 2


def refused(source, tmp_path, *options):
    target = tmp_path / "merged"
    result = run(source, target, *options)
    assert result.exit_code == 2, result.output
    assert not target.exists()
    assert not target.with_name("merged.partial").exists()
    return result.stderr


def test_bad_adapters_and_options(tiny_models, adapters, tmp_path):
    from int4_lora.integration.demo import recipe

    source, good = tiny_models["g32"], f"--adapter={adapters[0]}"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    recipe.make_adapter(tmp_path / "wide", {**LLAMA, "hidden_size": 512}, "wide", settings)
    said = refused(source, tmp_path, f"--adapter={tmp_path / 'wide'}")
    assert "the adapter is for a weight of [512, 512], the base has [256, 256]" in said
    assert Q_PROJ in said
    recipe.make_adapter(tmp_path / "deep", {**LLAMA, "num_hidden_layers": 3}, "deep", settings)
    said = refused(source, tmp_path, f"--adapter={tmp_path / 'deep'}")
    assert "model.layers.2.self_attn.q_proj" in said
    assert "PATH=WEIGHT" in refused(source, tmp_path, f"{good}=x")
    assert "finite weight" in refused(source, tmp_path, f"{good}=inf")
    assert "dtype is of a dense" in refused(source, tmp_path, good, "--to=int4", "--dtype=float16")
    inside = adapters[0] / "merged"
    result = run(source, inside, good)
    assert result.exit_code == 2
    assert not inside.exists()
    spoilt = shutil.copytree(adapters[0], tmp_path / "spoilt")
    file = spoilt / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    assert "must be finite" in refused(source, tmp_path, f"--adapter={spoilt}")


def test_a_merged_weight_that_overflows_is_named(tiny_models, adapters, tmp_path):
    source = shutil.copytree(tiny_models["g32"], tmp_path / "source")
    edit_tensors(source, weight_scale=lambda scale: torch.full_like(scale, 8000).half())
    for options in ([], ["--to=int4"]):
        result = run(source, tmp_path / "merged", f"--adapter={adapters[0]}=1e12", *options)
        assert result.exit_code == 2
        assert Q_PROJ in result.stderr
        assert "finite in float16" in result.stderr
        assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_shards_and_a_module_across_them(tiny_models, adapters, tmp_path):
    source = shutil.copytree(tiny_models["asym-g32"], tmp_path / "source")
    shard(source)
    options = [f"--adapter={adapters[0]}", "--to=int4"]
    assert run(source, tmp_path / "a", *options, "--max-shard-size=0.0002").exit_code == 0
    assert run(tiny_models["asym-g32"], tmp_path / "b", *options).exit_code == 0
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_head_that_is_tied_is_said_to_be(tiny_models, adapters, tmp_path):
    source = shutil.copytree(tiny_models["g32"], tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    edit_config(source, lambda config, _: config.update(tie_word_embeddings=True))
    said = refused(source, tmp_path, f"--adapter={adapters[1]}")
    assert "lm_head" in said
    assert "tied to the embeddings" in said


def test_what_was_reported_of_another_merge_is_not_carried_along(tiny_models, adapters, tmp_path):
    options = [f"--adapter={adapters[0]}", "--to=int4"]
    assert run(tiny_models["g32"], tmp_path / "first", *options).exit_code == 0
    assert run(tmp_path / "first", tmp_path / "second", f"--adapter={adapters[1]}").exit_code == 0
    assert not (tmp_path / "second/merge_report.json").exists()


def test_arguments_in_python_are_checked_first(tiny_models, adapters, tmp_path):
    from int4_lora.integration.conversion import merge_checkpoint

    source, target = tiny_models["g32"], tmp_path / "merged"
    for weight in (float("inf"), float("nan"), "x"):
        with pytest.raises(ValueError, match="finite number"):
            merge_checkpoint(source, target, [(adapters[0], weight)])
    with pytest.raises(ValueError, match="'int8'"):
        merge_checkpoint(source, target, [(adapters[0], 1.0)], to="int8")
    with pytest.raises(ValueError, match="float8"):
        merge_checkpoint(source, target, [(adapters[0], 1.0)], dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="at least one"):
        merge_checkpoint(source, target, [])
    assert not list(tmp_path.iterdir())
