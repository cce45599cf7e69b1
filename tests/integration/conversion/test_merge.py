"""int4-lora merge: dense to the last bit, INT4 with the error it reports, and what it refuses."""

import json
import shutil

import pytest
import torch

from int4_lora.integration import open_checkpoint, read_adapter
from int4_lora.integration.checkpoint.compressed_tensors import upstream_scheme
from int4_lora.reference import dequantize
from int4_lora.reference.rounding import round_once
from support.checkpoints import shard
from support.conversion import bytes_of, convert, run, tensors_of
from support.tiny import VARIANTS

pytestmark = pytest.mark.versions


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
    result = run("merge", source, tmp_path / "merged", *options)
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
    convert("merge", source, merged, f"--adapter={adapters[0]}")
    convert("unpack", source, dense, "--dtype", "float32")
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
    to = f"--to=int{VARIANTS[variant].get('num_bits', 4)}"
    options = [f"--adapter={adapters[0]}", f"--adapter={adapters[1]}=0.5", to]
    outcome = convert("merge", source, target, *options)
    report = json.loads((target / "merge_report.json").read_text())
    assert outcome["report"] == report
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
        convert("merge", source, tmp_path / scales, *options)
    exact = exact_weights(source, adapters[:1], [1.0])
    lost = {"search": 0.0, "minmax": 0.0, "theirs": 0.0}
    for name, expected in exact.items():
        module = name.removesuffix(".weight")
        scheme = open_checkpoint(source).schemes.get(module)
        if scheme is None:
            continue
        arguments, dense = upstream_scheme(scheme).weights, expected.bfloat16()
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
    convert("merge", source, tmp_path / "merged", *options)
    before, after = tensors_of(source), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    assert parts == {"q_proj", "down_proj", "lm_head"}
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_shards_and_a_module_across_them(tiny_models, adapters, tmp_path):
    source = shutil.copytree(tiny_models["asym-g32"], tmp_path / "source")
    shard(source)
    options = [f"--adapter={adapters[0]}", "--to=int4"]
    convert("merge", source, tmp_path / "a", *options, "--max-shard-size=0.0002")
    convert("merge", tiny_models["asym-g32"], tmp_path / "b", *options)
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_reported_of_another_merge_is_not_carried_along(tiny_models, adapters, tmp_path):
    options = [f"--adapter={adapters[0]}", "--to=int4"]
    convert("merge", tiny_models["g32"], tmp_path / "first", *options)
    convert("merge", tmp_path / "first", tmp_path / "second", f"--adapter={adapters[1]}")
    assert not (tmp_path / "second/merge_report.json").exists()


def kept_of(source, target, adapter, factor):
    """Return <W' - W, D> / <D, D> over all modules, of what is in two folders."""
    exact, merged = exact_weights(source, [adapter], [factor]), open_checkpoint(target)
    product = square = 0.0
    for module in merged.modules():
        base = dequantize(open_checkpoint(source).packed_weight(module), torch.float64)
        delta = exact[f"{module}.weight"] - base
        found = dequantize(merged.packed_weight(module), torch.float64) - base
        product, square = product + (found * delta).sum(), square + delta.square().sum()
    return float(product / square)


@pytest.mark.parametrize("scales", ["search", "minmax"])
@pytest.mark.parametrize(("factor", "lost"), [(1, False), (0.01, True)])
def test_an_adapter_that_int4_loses_is_reported(
    tiny_models, adapter, tmp_path, factor, lost, scales
):
    source, target = tiny_models["g128"], tmp_path / "merged"
    options = [f"--adapter={adapter}={factor}", "--to=int4", f"--scales={scales}"]
    result = run("merge", source, target, *options)
    assert result.exit_code == 0, result.output
    total = json.loads((target / "merge_report.json").read_text())["total"]
    assert total["delta_kept"] == pytest.approx(kept_of(source, target, adapter, factor), rel=1e-9)
    assert (total["delta_kept"] < 0.5) is lost, total
    part = f"the adapters' part is {total['relative_delta']:.4f}"
    assert part in " ".join(result.stdout.split())
    said = f"most of what the adapters add was lost: {total['delta_kept']:.2f} of it is in the"
    assert (said in " ".join(result.stdout.split())) is lost
    if lost and scales == "search":  # although the error looks small
        assert 0.5 * total["relative_delta"] < total["relative_error"] < 0.05


def test_an_adapter_that_adds_nothing_loses_nothing(tiny_models, adapter, tmp_path):
    source, target = tiny_models["g128"], tmp_path / "merged"
    outcome = convert("merge", source, target, f"--adapter={adapter}=0", "--to=int4")
    assert {one["delta_kept"] for one in outcome["report"]["modules"]} <= {1.0}
