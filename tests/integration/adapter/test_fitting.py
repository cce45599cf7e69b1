"""fit_adapter: renamed modules, split and fused projections, and what it says of the rest."""

import json

import pytest
import torch

from int4_lora.integration import (
    Adapter,
    AdapterModule,
    check_fits,
    fit_adapter,
    open_checkpoint,
    read_adapter,
    write_adapter,
)
from int4_lora.integration.adapter.adapter import Replacement
from int4_lora.integration.conversion import merge_checkpoint
from support import layouts
from support.bases import write_base, write_lora
from support.conversion import convert, refusal, run, tensors_of

LAYERS = ("layers.0.", "layers.1.")
LINEARS = {"self_attn.q_proj": (24, 32), "mlp.down_proj": (32, 48)}
TEXT = {layer + name: shape for layer in LAYERS for name, shape in LINEARS.items()}
VISION = {"blocks.0.mlp.down_proj": (16, 48), "blocks.0.attn.qkv": (48, 16)}
LAYOUTS = {  # the text model, the head, the vision tower
    "new": ("model.language_model.", "lm_head", "model.visual."),
    "old": ("language_model.model.", "language_model.lm_head", "vision_tower."),
    "text": ("model.", "lm_head", "visual."),
}


def base_shapes(layout):
    text, head, vision = LAYOUTS[layout]
    return {
        **{text + name: shape for name, shape in TEXT.items()},
        **{vision + name: shape for name, shape in VISION.items()},
        head: (40, 32),
    }


def write_vlm(folder, layout):
    vision = LAYOUTS[layout][2]
    dense = [LAYOUTS[layout][1], *(vision + name for name in VISION)]
    return write_base(folder, base_shapes(layout), dense=dense)


def with_prefix(prefix, shapes=TEXT):
    return {prefix + name: shape for name, shape in shapes.items()}


def fault(folder, shapes, base, **options):
    """Return why an adapter of these shapes does not fit a base."""
    write_lora(folder, shapes)
    with pytest.raises(ValueError, match=r"fit|no module") as raised:
        fit_adapter(read_adapter(folder), open_checkpoint(base), **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("layout", "trained", "rule"),
    [
        ("new", "text", "model.=model.language_model."),
        ("new", "old", "language_model.model.=model.language_model."),
        ("old", "text", "model.=language_model.model."),
        ("old", "new", "model.language_model.=language_model.model."),
        ("text", "new", "model.language_model.=model."),
        ("text", "old", "language_model.model.=model."),
    ],
)
def test_the_refusal_says_the_change_of_prefix_that_merges(tmp_path, layout, trained, rule):
    weights = write_vlm(tmp_path / "base", layout)
    text, here = LAYOUTS[trained][0], LAYOUTS[layout][0]
    pairs = write_lora(tmp_path / "lora", with_prefix(text))
    option = f"--adapter={tmp_path / 'lora'}"
    said = refusal("merge", tmp_path / "base", tmp_path / "merged", option)
    assert f"{text}layers.0.mlp.down_proj is no module of" in said
    assert said.rstrip().endswith(f"; all 4 would fit with --rename {rule}")
    inspected = run("inspect", tmp_path / "base", option, "--json")
    assert inspected.exit_code == 1
    assert f"with --rename {rule}" in json.loads(inspected.stdout)["adapters"][0]["fault"]

    options = [option, f"--rename={rule}"]
    outcome = convert(
        "merge", tmp_path / "base", tmp_path / "merged", *options, "--dtype", "float32"
    )
    assert outcome["notes"] == [f"{tmp_path / 'lora'}: --rename {rule} applied (x4)"]
    merged = tensors_of(tmp_path / "merged")
    for name, weight in weights.items():
        a, b = pairs.get(name.replace(here, text), (torch.zeros(1), torch.zeros(1)))
        delta = 2 * b @ a if a.ndim == 2 else 0
        assert torch.equal(merged[f"{name}.weight"], weight + delta), name
    inspected = run("inspect", tmp_path / "base", *options, "--json")
    report = json.loads(inspected.stdout)["adapters"][0]
    assert (report["fault"], report["notes"]) == (None, [f"--rename {rule} applied (x4)"])


def test_layers_and_head_may_need_two_changes(tmp_path):
    write_vlm(tmp_path / "base", "old")
    shapes = {**with_prefix("model.language_model."), "lm_head": (40, 32)}
    said = fault(tmp_path / "lora", shapes, tmp_path / "base")
    assert said.endswith(
        "all 5 would fit with --rename lm_head=language_model.lm_head "
        "--rename model.language_model.=language_model.model."
    )
    rules = [
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
    ]
    fitted = fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"), rules)
    assert set(fitted.modules) == {
        *with_prefix("language_model.model."),
        "language_model.lm_head",
    }
    said = fault(tmp_path / "b", shapes, tmp_path / "base", rename=rules[1:])
    assert said.endswith(", instead of --rename lm_head=language_model.lm_head")


def test_several_changes_that_fit_are_all_listed(tmp_path):
    shapes = with_prefix("model.encoder.") | with_prefix("model.decoder.")
    write_base(tmp_path / "base", shapes)
    said = fault(tmp_path / "lora", with_prefix("model."), tmp_path / "base")
    assert (
        "with --rename model.=model.decoder. or --rename model.=model.encoder., and names" in said
        or "with --rename model.=model.encoder. or --rename model.=model.decoder., and names"
        in said
    )
    apart = shapes | {"model.decoder.layers.1.mlp.down_proj": (40, 48)}
    write_base(tmp_path / "apart", apart)
    said = fault(tmp_path / "b", with_prefix("model."), tmp_path / "apart")
    assert said.endswith("with --rename model.=model.encoder.")  # shapes decide


def test_modules_that_fit_stay_where_they_are(tmp_path):
    """The prefix of the text model differs, that of the vision tower does not."""
    write_vlm(tmp_path / "base", "new")
    shapes = with_prefix("model.visual.", VISION) | with_prefix("model.")
    said = fault(tmp_path / "lora", shapes, tmp_path / "base")
    assert said.endswith("with --rename model.layers.=model.language_model.layers.")


@pytest.mark.parametrize(
    ("shapes", "first"),
    [
        ({"model.layers.7.self_attn.q_proj": (24, 32)}, "model.layers.7.self_attn.q_proj"),
        ({"transformer.layers.0.self_attn.q_proj": (23, 32)}, "transformer.layers.0.self_attn"),
        ({"model.layers.0.self_attn.o_proj": (32, 24)}, "model.layers.0.self_attn.o_proj"),
    ],
)
def test_no_change_of_prefix_is_named_where_none_fits(tmp_path, shapes, first):
    """A layer that is not there, another shape, another projection."""
    write_vlm(tmp_path / "base", "text")
    said = fault(tmp_path / "lora", shapes, tmp_path / "base")
    assert f"{first}" in said
    assert said.endswith(f"is no module of {tmp_path / 'base'}")


def test_a_layer_never_becomes_another_layer(tmp_path):
    write_base(tmp_path / "base", {f"model.layers.{i}.mlp.up_proj": (24, 32) for i in range(3)})
    said = fault(tmp_path / "lora", {"decoder.layers.1.mlp.up_proj": (24, 32)}, tmp_path / "base")
    assert said.endswith("with --rename decoder.=model.")


def test_the_first_rule_that_applies_is_the_only_one(tmp_path):
    write_vlm(tmp_path / "base", "new")
    write_lora(tmp_path / "lora", with_prefix(""))
    rules = [("layers.0.", "model.language_model.layers.0."), ("", "model.language_model.")]
    fitted = fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"), rules)
    assert set(fitted.modules) == set(with_prefix("model.language_model."))
    assert fitted.notes == (
        "--rename layers.0.=model.language_model.layers.0. applied (x2)",
        "--rename '=model.language_model.' applied (x2)",
    )


def test_replaced_tensors_are_renamed_too(tmp_path):
    write_vlm(tmp_path / "base", "old")
    adapter = Adapter(
        tmp_path / "lora", {}, {}, {"lm_head.weight": Replacement(torch.zeros(40, 32))}
    )
    checkpoint = open_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=r"with --rename lm_head=language_model\.lm_head$"):
        fit_adapter(adapter, checkpoint)
    fitted = fit_adapter(adapter, checkpoint, [("lm_head", "language_model.lm_head")])
    assert set(fitted.replacements) == {"language_model.lm_head.weight"}


@pytest.mark.parametrize("layout", ["text", "old"])
def test_a_tied_head_is_a_weight_of_the_base(tmp_path, layout):
    """No tensor stores it, and merge knows what to do with it."""
    text, head, _ = LAYOUTS[layout]
    shapes = with_prefix(text)
    embeddings = f"{text}embed_tokens"
    tied = {"dense": [embeddings], "tie_word_embeddings": True}
    write_base(tmp_path / "base", {**shapes, embeddings: (40, 32)}, **tied)
    write_lora(tmp_path / "lora", {**shapes, head: (40, 32)})
    fitted = fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))
    assert head in fitted.modules
    said = fault(tmp_path / "other", {"other.lm_head": (40, 32)}, tmp_path / "base")
    prefix = head.removesuffix("lm_head")
    assert said.endswith(f"it would fit with --rename other.={prefix}")
    write_base(tmp_path / "untied", shapes, tie_word_embeddings=False)
    said = fault(tmp_path / "more", {**shapes, head: (40, 32)}, tmp_path / "untied")
    assert f"{head} is no module of" in said


def test_rules_that_cannot_be_meant(tmp_path):
    write_vlm(tmp_path / "base", "text")
    shapes = with_prefix("model.") | {"layers.0.mlp.down_proj": (32, 48)}
    write_lora(tmp_path / "lora", shapes)
    adapter, checkpoint = read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=r"^[^:]+: [^:]+ would both be model\.layers\.0\.mlp"):
        fit_adapter(adapter, checkpoint, [("layers.", "model.layers.")])
    for rule in ("model.", ("model.", 1), ("a", "b", "c")):
        with pytest.raises(TypeError, match=r"rename must be pairs \(OLD, NEW\) of strings"):
            fit_adapter(adapter, checkpoint, [rule])
    option, target = f"--adapter={tmp_path / 'lora'}", tmp_path / "merged"
    for rule in ("model.", "model.=a=b", "model.=model."):
        said = refusal("merge", tmp_path / "base", target, option, f"--rename={rule}")
        assert "--rename must be OLD=NEW, two different prefixes, got" in said
    said = refusal("merge", tmp_path / "base", target, option, "--rename=modle.=model.")
    assert "--rename modle.=model. applies to no name of the adapters" in said
    said = run("inspect", tmp_path / "base", "--rename=model.=a.")
    assert said.exit_code == 2
    assert "applies to no name" in said.stderr


QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
ROWS = {"q_proj": (24, 32), "k_proj": (10, 32), "v_proj": (10, 32)}
SPLIT = {
    **{f"model.layers.0.self_attn.{part}": shape for part, shape in ROWS.items()},
    "model.layers.0.mlp.gate_proj": (18, 32),
    "model.layers.0.mlp.up_proj": (18, 32),
}
FUSED = {QKV: (44, 32), GATE_UP: (36, 32)}
EXPERT = "model.layers.0.mlp.experts.3."


def split_deltas(pairs, scaling=2):
    """Return what a split adapter adds to the fused weights."""
    delta = {name: scaling * b @ a for name, (a, b) in pairs.items()}
    attention = "model.layers.0.self_attn."
    qkv = [
        delta.get(attention + part, torch.zeros(ROWS[part]))
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    gate_up = [
        delta.get(f"model.layers.0.mlp.{part}_proj", torch.zeros(18, 32)) for part in ("gate", "up")
    ]
    return {QKV: torch.cat(qkv), GATE_UP: torch.cat(gate_up)}


@pytest.mark.parametrize(
    "parts", ["qkv", "q", "v", "qk", "qv", "kv", "gate up", "gate", "up"], ids=str
)
def test_a_split_adapter_on_a_fused_base(tmp_path, parts):
    weights = write_base(tmp_path / "base", FUSED)
    wanted = parts.split() if "g" in parts or "up" in parts else list(parts)
    shapes = {
        name: shape
        for name, shape in SPLIT.items()
        if name.rpartition(".")[2].removesuffix("_proj") in wanted
    }
    pairs = write_lora(tmp_path / "lora", shapes)
    outcome = merge_checkpoint(
        tmp_path / "base", tmp_path / "merged", [(tmp_path / "lora", 1.0)], dtype=torch.float32
    )
    (note,) = outcome.notes
    assert note.endswith(
        "A stacked, B in blocks (x1)"
        if len(wanted) > 1
        else f"{wanted[0]}_proj taken for its rows of the base's "
        f"{'qkv' if wanted[0] in 'qkv' else 'gate_up'}_proj: B is zero in the others (x1)"
    )
    merged, deltas = tensors_of(tmp_path / "merged"), split_deltas(pairs)
    for name, weight in weights.items():
        assert torch.equal(merged[f"{name}.weight"], weight + deltas[name]), name


@pytest.mark.parametrize("other", ["q_proj", "v_proj"])
def test_a_pair_of_zeros_tells_where_the_rows_of_k_alone_begin(tmp_path, other):
    write_base(tmp_path / "base", FUSED)
    attention = "model.layers.0.self_attn."
    alone = write_lora(tmp_path / "k", {f"{attention}k_proj": ROWS["k_proj"]})
    refused = refusal("merge", tmp_path / "base", tmp_path / "x", f"--adapter={tmp_path / 'k'}")
    assert "add a pair of one of them whose lora_B is zero, with as many rows as it has" in refused
    zero = {f"{attention}{other}": (torch.zeros(4, 32), torch.zeros(ROWS[other][0], 4))}
    pairs = alone | zero
    layouts.write_adapter(
        tmp_path / "both", layouts.lora_tensors(pairs), layouts.lora_config(pairs)
    )
    fitted = fit_adapter(read_adapter(tmp_path / "both"), open_checkpoint(tmp_path / "base"))
    module = fitted.modules[QKV]
    delta = module.scaling * module.b @ module.a
    assert torch.equal(delta, split_deltas(alone)[QKV])


def test_a_fused_adapter_on_a_split_base(tmp_path):
    weights = write_base(tmp_path / "base", SPLIT)
    pairs = write_lora(tmp_path / "lora", FUSED)
    options = [f"--adapter={tmp_path / 'lora'}", "--dtype", "float32"]
    outcome = convert("merge", tmp_path / "base", tmp_path / "merged", *options)
    assert outcome["notes"] == [
        f"{tmp_path / 'lora'}: {note}: A shared, rows of B (x1)"
        for note in (
            "gate_up_proj divided for the base's gate_proj and up_proj",
            "qkv_proj divided for the base's q_proj, k_proj and v_proj",
        )
    ]
    (qa, qb), (ga, gb) = pairs[QKV], pairs[GATE_UP]
    deltas = [*(2 * qb @ qa).split([24, 10, 10]), *(2 * gb @ ga).split([18, 18])]
    merged = tensors_of(tmp_path / "merged")
    for (name, weight), delta in zip(weights.items(), deltas, strict=True):
        assert torch.equal(merged[f"{name}.weight"], weight + delta), name


def test_experts_are_mapped_each_alone(tmp_path):
    write_base(tmp_path / "base", {f"{EXPERT}{part}_proj": (18, 32) for part in ("gate", "up")})
    pairs = write_lora(tmp_path / "lora", {f"{EXPERT}gate_up_proj": (36, 32)})
    fitted = fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))
    a, b = pairs[f"{EXPERT}gate_up_proj"]
    gate, up = fitted.modules[f"{EXPERT}gate_proj"], fitted.modules[f"{EXPERT}up_proj"]
    assert all(torch.equal(module.a, a) for module in (gate, up))
    assert torch.equal(gate.b, b[:18])
    assert torch.equal(up.b, b[18:])


def test_different_scalings_ranks_and_dtypes_are_kept_exactly(tmp_path):
    write_base(tmp_path / "base", FUSED)
    generator = torch.Generator().manual_seed(1)

    def module(rows, rank, scaling, dtype):
        a, b = (
            torch.randn(rank, 32, generator=generator),
            torch.randn(rows, rank, generator=generator),
        )
        return AdapterModule(a.to(dtype), b.to(dtype), scaling)

    attention = "model.layers.0.self_attn."
    parts = {
        f"{attention}q_proj": module(24, 3, 1 / 3, torch.bfloat16),
        f"{attention}k_proj": module(10, 2, 0.7, torch.float16),
        f"{attention}v_proj": module(10, 1, 1 / 3, torch.float32),
    }
    checkpoint = open_checkpoint(tmp_path / "base")
    fitted = fit_adapter(Adapter(tmp_path, {}, parts), checkpoint)
    joined = fitted.modules[QKV]
    assert "their scalings differ, so B is multiplied by them in float64" in fitted.notes[0]
    assert (joined.scaling, joined.a.dtype, joined.b.dtype) == (1.0, torch.float64, torch.float64)
    q, k, v = parts.values()
    assert torch.equal(joined.a, torch.cat([q.a.double(), k.a.double(), v.a.double()]))
    blocks = [part.b.double() * part.scaling for part in (q, k, v)]
    assert torch.equal(joined.b, torch.block_diag(*blocks))

    same = {name: AdapterModule(part.a, part.b, 0.7) for name, part in parts.items()}
    joined = fit_adapter(Adapter(tmp_path, {}, same), checkpoint).modules[QKV]
    assert (joined.scaling, joined.a.dtype) == (0.7, torch.float32)  # the smallest that holds all
    assert torch.equal(joined.b, torch.block_diag(q.b.float(), k.b.float(), v.b))


@pytest.mark.parametrize(
    ("base", "shapes", "said"),
    [
        (FUSED, {"k_proj": (10, 32)}, "has k_proj alone, and where its rows begin"),
        (
            FUSED,
            {"q_proj": (44, 32)},
            "44 rows, which are [q_proj; k_proj; v_proj], the adapter has q_proj 44: that does not",
        ),
        (FUSED, {"q_proj": (25, 32)}, "the adapter has q_proj 25: that does not add up"),
        (
            FUSED,
            {"q_proj": (24, 32), "v_proj": (12, 32)},
            "q_proj 24, v_proj 12: that does not add up, for k_proj and v_proj have as many rows",
        ),
        (FUSED, {"v_proj": (22, 32)}, "the adapter has v_proj 22: that does not add up"),
        (FUSED, {**ROWS, "q_proj": (23, 32)}, "q_proj 23, k_proj 10, v_proj 10: that"),
        (FUSED, {**ROWS, "k_proj": (10, 16)}, "the adapter's parts have [16, 32] in_features"),
        (FUSED, {"qkv_proj": (44, 32), "v_proj": (10, 32)}, "on it and on its part v_proj: remove"),
        (
            SPLIT,
            {"qkv_proj": (44, 32), "v_proj": (10, 32)},
            "on it and on its part model.layers.0.self_attn.v_proj: remove",
        ),
        (
            SPLIT,
            {"qkv_proj": (42, 32)},
            "the base has q_proj 24, k_proj 10, v_proj 10: that does not add up",
        ),
    ],
)
def test_attention_that_does_not_add_up_is_refused(tmp_path, base, shapes, said):
    write_base(tmp_path / "base", base)
    shapes = {f"model.layers.0.self_attn.{part}": shape for part, shape in shapes.items()}
    write_lora(tmp_path / "lora", shapes)
    message = refusal(
        "merge", tmp_path / "base", tmp_path / "merged", f"--adapter={tmp_path / 'lora'}"
    )
    assert f"{tmp_path / 'lora'}: {QKV}: " in message
    assert said in message


@pytest.mark.parametrize(
    ("base", "shapes", "said"),
    [
        ((18, 18), {"gate": (17, 32), "up": (19, 32)}, "gate_proj 17, up_proj 19: that"),
        ((18, 18), {"up": (19, 32)}, "up_proj 19: that does not add up"),
        (None, {"gate_up": (36, 32)}, "the base has gate_proj 17, up_proj 19: that"),
    ],
)
def test_gate_and_up_have_as_many_rows_as_each_other(tmp_path, base, shapes, said):
    uneven = {"model.layers.0.mlp.gate_proj": (17, 32), "model.layers.0.mlp.up_proj": (19, 32)}
    write_base(tmp_path / "base", uneven if base is None else FUSED)
    shapes = {f"model.layers.0.mlp.{part}_proj": shape for part, shape in shapes.items()}
    write_lora(tmp_path / "lora", shapes)
    with pytest.raises(ValueError, match=said):
        fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))


def test_a_base_with_some_of_the_parts_is_refused(tmp_path):
    write_base(tmp_path / "base", {name: SPLIT[name] for name in list(SPLIT)[:2]})
    write_lora(tmp_path / "lora", {QKV: (44, 32)})
    with pytest.raises(ValueError, match=r"the base has qkv_proj's parts, but no .*v_proj"):
        fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize(
    ("model_type", "shapes", "said"),
    [
        (
            "codegen",
            {"self_attn.q_proj": (24, 32)},
            "qkv_proj is four blocks, each of rows of q, v",
        ),
        *(
            (kind, {"self_attn.q_proj": (24, 32)}, "qkv_proj is rows of q, k and v of one head")
            for kind in ("minimax", "minimax_m1", "minimax_text_01", "MiniMaxM1")
        ),
        ("gpt_oss", {"mlp.gate_proj": (18, 32)}, "gate_up_proj is a row of gate, then one of up"),
    ],
)
def test_models_with_another_order_of_rows_are_refused(tmp_path, model_type, shapes, said):
    write_base(
        tmp_path / "base", FUSED, model_type="any", thinker={"text": {"model_type": model_type}}
    )
    write_lora(
        tmp_path / "lora", {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    )
    with pytest.raises(ValueError, match=f"says model_type '{model_type}', whose {said}"):
        fit_adapter(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))


def test_the_order_in_a_speech_tower_does_not_hold_for_the_text_model(tmp_path):
    speech = "model.audio.encoders.0.feed_forward_in."
    shapes = {f"{speech}gate_up_proj": (36, 32), GATE_UP: (36, 32)}
    write_base(tmp_path / "base", shapes, model_type="phi4_multimodal")
    parts = {f"{speech}gate_proj": (18, 32), "model.layers.0.mlp.gate_proj": (18, 32)}
    for number, (name, shape) in enumerate(parts.items()):
        write_lora(tmp_path / str(number), {name: shape})
    checkpoint = open_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match="gate_up_proj is rows of up, then of gate"):
        fit_adapter(read_adapter(tmp_path / "0"), checkpoint)
    assert set(fit_adapter(read_adapter(tmp_path / "1"), checkpoint).modules) == {GATE_UP}


def test_a_prefix_and_a_form_may_differ_together(tmp_path):
    prefix = {name.replace("model.", "model.language_model.", 1): FUSED[name] for name in FUSED}
    write_base(tmp_path / "base", prefix)
    said = fault(tmp_path / "lora", SPLIT, tmp_path / "base")
    assert said.endswith("all 5 would fit with --rename model.=model.language_model.")
    wrong = {**SPLIT, "model.layers.0.self_attn.q_proj": (23, 32)}
    said = fault(tmp_path / "wrong", wrong, tmp_path / "base")
    assert said.endswith(f"is no module of {tmp_path / 'base'}")


def test_a_fitted_adapter_can_be_written_and_read(tmp_path):
    write_base(tmp_path / "base", FUSED)
    write_lora(tmp_path / "lora", SPLIT)
    checkpoint = open_checkpoint(tmp_path / "base")
    adapter = read_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="fit_adapter brings its split or fused modules into"):
        check_fits(adapter, checkpoint)
    fitted = fit_adapter(adapter, checkpoint)
    check_fits(fitted, checkpoint)
    written = write_adapter(tmp_path / "written", fitted.modules)
    check_fits(written, checkpoint)
    assert torch.equal(written.modules[QKV].b, fitted.modules[QKV].b)


def model_of(kind, **config):
    """Return a tiny float64 model of transformers."""
    import transformers

    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind}Config")(**settings, **config)
    return getattr(transformers, f"{kind}ForCausalLM")(configuration).double().eval()


def fuse(tensors):
    """Return a Llama's tensors as a Phi-3's."""
    fused = {}
    for name, tensor in tensors.items():
        for whole, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            if f".{parts[0]}_proj." in name:
                names = [name.replace(f".{parts[0]}_", f".{part}_") for part in parts]
                key = name.replace(f".{parts[0]}_", f".{whole}_")
                fused[key] = torch.cat([tensors[part] for part in names])
        if not any(f".{part}_proj." in name for part in ("q", "k", "v", "gate", "up")):
            fused[name] = tensor
    return fused


@pytest.mark.versions
@pytest.mark.parametrize("trained", ["Llama", "Phi3"])
def test_peft_gives_the_same_logits_on_the_other_form(tmp_path, trained):
    """One model as a Llama and as a Phi-3: the adapter of one, mapped, is PEFT's on the other."""
    from peft import LoraConfig, PeftModel, get_peft_model

    models = {kind: model_of(kind) for kind in ("Llama", "Phi3")}
    models["Phi3"].load_state_dict(fuse(models["Llama"].state_dict()))
    (other,) = models.keys() - {trained}
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in models[other].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    write_base(tmp_path / "base", shapes, dense=["lm_head"], model_type=other.lower())
    settings = {
        "Phi3": {"target_modules": ["qkv_proj", "gate_up_proj"]},
        "Llama": {
            "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"up_proj": 5},
        },
    }
    config = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings[trained])
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain = {kind: model(tokens).logits for kind, model in models.items()}
        peft = get_peft_model(models[trained], config, autocast_adapter_dtype=False).eval()
        truth = peft(tokens).logits
        peft.save_pretrained(tmp_path / "trained", save_embedding_layers=False)
        fitted = fit_adapter(read_adapter(tmp_path / "trained"), open_checkpoint(tmp_path / "base"))
        write_adapter(tmp_path / "fitted", fitted.modules)
        mapped = PeftModel.from_pretrained(
            models[other], tmp_path / "fitted", autocast_adapter_dtype=False
        )
        logits = mapped.eval()(tokens).logits
    noise = (plain["Llama"] - plain["Phi3"]).abs().max()  # their norms compute in float32
    assert noise < 1e-5
    assert (truth - plain[trained]).abs().max() > 0.1
    assert (logits - truth).abs().max() < 1e-5
