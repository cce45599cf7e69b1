"""The benchmark of fine-tuning: files, bytes, order, bars, text. No time is measured."""

import dataclasses
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from support.children import Answers, assert_only_who_runs_goes_on
from support.tiny import LLAMA

ROOT = Path(__file__).parents[2]
CONTENDERS = ("dense", "decompressed", "ours")
MIB = 2**20


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny INT4 checkpoint and its dense twin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        files = importlib.import_module("benchmarks.finetune.files")
    made = tmp_path_factory.mktemp("finetune")
    files.make(made, {**LLAMA, "tie_word_embeddings": True})
    return made


def test_the_twin_has_the_weights_that_compressed_tensors_decompresses(folder):
    checkpoint = open_checkpoint(folder / "int4")
    before = load_file(folder / "int4" / "model.safetensors")
    after = load_file(folder / "dense" / "model.safetensors")
    modules = checkpoint.modules()
    assert len(modules) == 14
    for name in modules:
        dense, expected = after.pop(f"{name}.weight"), decompress(checkpoint, name)
        assert dense.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(dense, expected)
    rest = {name: tensor for name, tensor in before.items() if ".weight_" not in name}
    assert after.keys() == rest.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in rest.items())
    assert not any("lm_head" in name for name in after)  # it is tied
    assert "quantization_config" not in json.loads((folder / "dense/config.json").read_text())


def test_files_are_made_once(module, monkeypatch, tmp_path):
    files, made = module("finetune.files"), []
    monkeypatch.setattr(files, "make", lambda folder, sizes: made.append(sizes))
    first, second = (files.prepare(tmp_path, 2048, 16) for _ in range(2))
    assert first == second
    assert first.int4.parent.is_dir()
    (sizes,) = made
    assert (sizes["hidden_size"], sizes["intermediate_size"]) == (2048, 5632)
    assert (sizes["vocab_size"], sizes["tie_word_embeddings"]) == (8192, True)
    assert sizes["num_hidden_layers"] == 16


def test_bytes_that_the_checkpoint_stores(module, folder):
    stored = module("finetune.accounting").stored(folder / "int4")
    weights = [256 * 256] * 2 + [128 * 256] * 2 + [512 * 256] * 3  # q, o; k, v; the MLP's
    scales = sum(weights) // 128 * 2
    assert stored.int4 == 2 * (sum(weights) // 2 + scales + 7 * 16)  # 16: weight_shape
    assert stored.dense == 2 * (512 * 256 + 5 * 256)  # the embedding and the norms
    assert stored.as_bf16 == 2 * 2 * sum(weights)
    assert stored.layer_as_bf16 == 2 * 512 * 256


def test_what_a_step_may_take(module):
    stored = module("finetune.accounting").Stored(100, 10, 400, 50)
    assert stored.most_peak(1000) == 1000 - 400 + 112 + 50
    assert stored.layout_share(10 + 103) == 1.03


def test_held_bytes_count_shared_tensors_once(module):
    held = module("finetune.accounting").held_bytes
    linear = torch.nn.Linear(4, 8, bias=False)
    model = torch.nn.Sequential(linear, linear, torch.nn.Linear(8, 4))
    model.register_buffer("view", linear.weight.detach()[:2])
    model.register_buffer("packed", torch.zeros(3, dtype=torch.int32))
    assert held(model) == 4 * (32 + 32 + 4) + 12


@pytest.fixture
def contender(module, folder):
    """Return a function that loads a contender in this process."""

    def load(name):
        made = module("finetune.contender").Contender()
        made.imports(name)
        facts = made.load(str(folder / ("dense" if name == "dense" else "int4")))
        return made, facts

    return load


def test_a_dense_contender_trains_and_generates(contender, module):
    made, facts = contender("dense")
    assert facts["held"] >= 2 * (512 * 256 + 2 * (4 * 256 * 256 + 3 * 512 * 256) * 3 // 4)
    held, plain = module("finetune.accounting").held_bytes, made._plain
    trained = made.adapt()["trained"]
    sides = 2 * [512] + 2 * [384] + 3 * [768]  # in and out of q, o; k, v; the MLP's
    assert trained == 2 * 16 * sum(sides)
    both = torch.nn.ModuleList([plain, made._adapted])
    assert held(both) == held(plain) + 4 * trained  # float32; the base is there once
    first, *_, last = (made.step(2, 8, checkpointing) for checkpointing in (False, True, True))
    assert last["loss"] < first["loss"]
    assert first["seconds"] == pytest.approx(first["forward"] + first["backward"] + first["update"])
    assert not plain.training
    assert made.generate(4, 3, adapter=True)["tokens_per_second"] > 0
    generate = module("finetune.contender").counted(made.generate)
    assert generate(prompt=4, new=3, adapter=False)["graphs"] == 0


def test_the_decompressed_contender_is_dense_before_it_is_adapted(contender, module):
    made, facts = contender("decompressed")
    twin, _ = contender("dense")
    made.adapt(), twin.adapt()
    assert module("finetune.accounting").held_bytes(made._plain) > 2 * facts["held"]
    weight = made._plain.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, twin._plain.model.layers[0].mlp.up_proj.weight)
    assert made.step(2, 8, checkpointing=False)["loss"] == twin.step(2, 8, False)["loss"]


def test_ours_holds_the_layout_and_shares_it(contender, module, folder):
    made, facts = contender("ours")
    stored = module("finetune.accounting").stored(folder / "int4")
    assert 1 <= stored.layout_share(facts["held"]) <= 1.12
    made.adapt()
    layers = [
        model.get_submodule("model.layers.1.mlp.up_proj")
        for model in (made._plain, made._adapted.get_base_model())
    ]
    plain, adapted = layers[0], layers[1].base_layer
    tensors = [dict(layer.named_buffers()) for layer in (plain, adapted)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name] is tensors[1][name] for name in tensors[0])
    assert adapted.prepared is adapted._layout  # nothing was laid out again


SIZES = {"rows": 2, "length": 8, "prompt": 4, "new": 3}
STEP = {"seconds": 3.0, "forward": 1.0, "backward": 1.5, "update": 0.5, "loss": 2.0}


def reply(command, arguments):
    """Answer a command as a contender does."""
    if command == "imports":
        return {"memory": {"now": 100 * MIB, "peak": 100 * MIB}, "threads": 2}
    if command == "load":
        memory = {"now": 300 * MIB, "peak": 400 * MIB}
        return {"seconds": 1.0, "held": 150 * MIB, "memory": memory}
    if command == "adapt":
        return {"trained": 7}
    if command == "step":
        return {**STEP, "peak": 500 * MIB, "resets": True, "graphs": 0}
    if command == "generate":
        return {"seconds": 2.0, "tokens_per_second": 4.0, "graphs": 0}
    return {"seconds": 0.5, "graphs": 0}


def test_every_workload_runs_on_every_contender_in_another_order(module, monkeypatch):
    monkeypatch.setattr(module("turns"), "SETTLE", 0)
    rounds, asked = module("finetune.rounds"), []
    workloads = module("finetune.workloads")
    every = (*workloads.STEPS, *workloads.GENERATES)
    turns = rounds.Rounds(every, "nowhere", 2, lambda line: None)
    turns.children = {name: Answers(name, asked, reply) for name in CONTENDERS}
    sizes = workloads.Sizes(**SIZES)
    runs = turns.run(sizes, 2, seed=0)
    assert len(runs) == 12
    assert all(len(run["rounds"]) == 2 and run["cold"] for run in runs)
    assert_only_who_runs_goes_on(asked, ("step", "generate"))
    commands = [json.dumps(entry) for entry in asked if entry[1] in ("step", "generate")]
    orders = [commands[start : start + 12] for start in range(0, 36, 12)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len(set(orders[0])) == 12
    assert set(turns.idle_shares()) == set(CONTENDERS)


@pytest.mark.parametrize("layers", [2, 4])
def test_each_model_is_loaded_once(module, monkeypatch, tmp_path, layers):
    command, made = module("finetune.__main__"), []

    class Rounds:
        def __init__(self, workloads, *given):
            made.append(workloads)
            self.workloads = workloads

        def load(self, files):
            return {"ours": 2}

        def run(self, sizes, rounds, seed):
            return list(self.workloads)

        def idle_shares(self):
            return {"ours": 0.0}

        def close(self):
            made.append("closed")

    monkeypatch.setattr(command, "Rounds", Rounds)
    options = options_of(module, "--parts", "steps", "generate")
    files = module("finetune.files").Files
    whole, timed = (files(Path(f"{count}"), Path("dense")) for count in (4, layers))
    results, threads = command.measured(options, whole, timed)
    steps, generates = ("step", "step, checkpointing"), ("generate", "generate, adapter")
    groups = [(*generates, *steps)] if layers == 4 else [generates, steps]
    assert made == [entry for group in groups for entry in (group, "closed")]
    assert results["rounds"] == [*generates, *steps]
    assert list(results["idle_shares"]) == [f"ours ({group[0]})" for group in groups]
    assert threads == 2


def test_orders_follow_the_seed(module):
    shuffled = module("turns").shuffled
    first, again, other = (list(shuffled(range(9), 3, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [number for number, _ in first] == [0, 1, 2, 3]
    assert all(sorted(order) == list(range(9)) for _, order in first)
    assert len({order for _, order in first}) == 4


def test_fresh_processes(module, monkeypatch, tmp_path):
    starts, made, asked = module("finetune.starts"), [], []

    def child(module_name, log, environment):
        made.append((Path(log).stem, environment))
        return Answers(Path(log).stem, asked, reply)

    monkeypatch.setattr(starts, "Child", child)
    sizes = module("finetune.workloads").Sizes(**SIZES)
    files = module("finetune.files").Files(Path("int4"), Path("dense"))
    workloads = ("forward", "forward, 1 token", "training")
    settings = {"rounds": 2, "threads": 3, "seed": 0, "say": lambda line: None}
    results = starts.starts(files, sizes, tmp_path, workloads=workloads, **settings)
    counts = {name: 0 for name in CONTENDERS}
    for run in results:
        counts[run["contender"]] += 1
        assert len(run["times"]) == (2 if run["workload"] == "training" else 3)
        assert ("adapt" in run) == (run["workload"] == "training")
    assert counts == {"dense": 6, "decompressed": 3, "ours": 12}
    assert {environment["OMP_NUM_THREADS"] for _, environment in made} == {"3"}
    caches = {log: environment["TORCHINDUCTOR_CACHE_DIR"] for log, environment in made}
    assert len(set(caches.values())) == 15  # shared by the cold and the cached process only
    assert caches["start-1-ours-forward-cold"] == caches["start-1-ours-forward-cached"]
    logs = [log for log, _ in made]
    assert logs.index("start-1-ours-forward-cold") + 1 == logs.index("start-1-ours-forward-cached")
    loaded = {name: given["folder"] for name, command, given in asked if command == "load"}
    assert {loaded[name] for name in loaded if "dense" in name} == {"dense"}
    assert {loaded[name] for name in loaded if "dense" not in name} == {"int4"}
    assert sum(command == "close" for _, command, _ in asked) == len(made)


def test_figures_of_a_fresh_process(module):
    answers = [{**STEP, "seconds": seconds, "peak": peak * MIB, "resets": True}
               for seconds, peak in ((6.0, 700), (3.0, 500), (2.0, 400))]  # fmt: skip
    run = {"imports": reply("imports", {}), "load": reply("load", {}), "times": answers}
    figures = module("finetune.bars").of_process(run)
    assert figures == {
        "load": 1.0, "first": 6.0, "second": 3.0, "third": 2.0, "first_over_third": 3.0,
        "held": 150 * MIB, "imports": 100 * MIB, "load_peak": 300 * MIB, "peak": 600 * MIB,
        "last_peak": 300 * MIB, "process": 700 * MIB,
    }  # fmt: skip
    answers[1]["resets"] = False  # its peak may be that of an earlier step
    figures = module("finetune.bars").of_process({**run, "times": answers[:2]})
    assert (figures["peak"], figures["last_peak"]) == (None, None)
    assert (figures["second"], figures["third"], figures["first_over_third"]) == (3.0, None, None)


# 1.12 x 100 MiB of INT4 for 400 MiB of bf16 weights, 20 MiB for a layer; dense takes 1000 MiB
STORED = (100 * MIB, 10 * MIB, 400 * MIB, 20 * MIB)
PEAK = 1.05 * (1000 - 400 + 112 + 20)
SECONDS = {  # with which every bar is just reached
    ("dense", "step"): 1.0, ("ours", "step"): 1.2, ("decompressed", "step"): 1.0,
    ("dense", "step, checkpointing"): 2.0, ("ours", "step, checkpointing"): 2.4,
    ("dense", "generate"): 5.0, ("ours", "generate"): 2.0,
    ("dense", "generate, adapter"): 4.0, ("ours", "generate, adapter"): 2.0,
}  # fmt: skip


def started(held=122, peak=PEAK, first=3.0):
    """Return the fresh processes of a run; sizes in MiB."""
    runs = []
    for name, state, step_peak in (
        ("dense", "fresh", 1000), ("ours", "cold", 2000), ("ours", "cached", peak),
    ):  # fmt: skip
        load = {**reply("load", {}), "held": held * MIB}
        facts = {"contender": name, "state": state, "imports": reply("imports", {}), "load": load}
        step = {**reply("step", {}), "peak": (100 + step_peak) * MIB}
        runs.append({**facts, "workload": "training", "times": [step] * 2})
        times = [{"seconds": seconds, "graphs": 0} for seconds in (first, 1.5, 1.0)]
        runs.append({**facts, "workload": "forward", "times": times})
    return runs


def rounds_of(seconds):
    runs = []
    for (name, workload), value in seconds.items():
        answer = {"seconds": value, "graphs": 0}
        if workload.startswith("generate"):
            answer["tokens_per_second"] = 64 / value
        else:
            answer |= {"forward": 0.4 * value, "backward": 0.5 * value, "update": 0.1 * value}
        facts = {"contender": name, "workload": workload}
        runs.append({**facts, "rounds": [answer] * 5, "cold": answer})
    return runs


def judged(module, runs=SECONDS, **figures):
    stored = module("finetune.accounting").Stored(*STORED)
    return module("finetune.bars").judged(started(**figures), rounds_of(runs), stored)


def test_bars_that_are_just_reached(module):
    rows = judged(module)
    assert len(rows) == 7
    assert {row["bar"]: row["ratio"] for row in rows if row["reached"] is not True} == {}


@pytest.mark.parametrize(
    "figure",
    [{"held": 122.1}, {"peak": 1.001 * PEAK}, {"first": 3.01}],
    ids=lambda given: str(given),
)
def test_bars_of_fresh_processes_that_are_just_missed(module, figure):
    assert sum(row["reached"] is False for row in judged(module, **figure)) == 1


@pytest.mark.parametrize("slower", [key for key in SECONDS if key[0] == "ours"], ids=str)
def test_bars_of_speed_that_are_just_missed(module, slower):
    rows = judged(module, {**SECONDS, slower: 1.01 * SECONDS[slower]})
    (missed,) = (row["bar"] for row in rows if not row["reached"])
    assert missed.startswith(f"{slower[1]}: ")


def test_a_value_that_was_not_measured_reaches_no_bar(module):
    stored = module("finetune.accounting").Stored(*STORED)
    rows = module("finetune.bars").judged([], [], stored)
    assert [row["reached"] for row in rows] == [None] * 7
    assert not module("limits").Limit(most=1).reached(float("nan"))


def options_of(module, *given):
    return module("finetune.__main__").options_of(list(given))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], None),
        (["--rounds", "9", "--starts", "4"], None),
        (["--layers", "8"], "they are for hidden 2048 with 16 layers, 4 for times"),
        (["--timed-layers", "3"], "they are for hidden 2048 with 16 layers, 4 for times"),
        (["--timed-layers", "16"], None),
        (["--rounds", "4"], "they are for 5 rounds or more and 3 fresh processes or more"),
        (["--starts", "2"], "they are for 5 rounds or more and 3 fresh processes or more"),
        (["--quick"], "they are for hidden 2048 with 16 layers, 4 for times"),
        (
            ["--quick", "--hidden", "2048", "--layers", "16", "--timed-layers", "4"],
            "they are for steps of 4 x 256 tokens and 64 generated tokens",
        ),
    ],
)
def test_when_the_bars_hold(module, given, why):
    assert module("finetune.bars").not_judged(options_of(module, *given)) == why


@pytest.mark.parametrize("given", [["--hidden", "300"], ["--rounds", "0"], ["--parts", "all"]])
def test_wrong_options_are_refused(module, given, capsys):
    with pytest.raises(SystemExit):
        options_of(module, *given)
    assert given[0] in capsys.readouterr().err


MACHINE = {
    "date": "2026-11-30", "gpu": None, "cpu": "Xeon", "cores": 2, "threads": 2, "torch": "2.13.0",
    "triton": None, "vllm": None, "int4-lora": "0.1.0",
}  # fmt: skip


def record(seconds=SECONDS, **changes):
    return {
        "machine": MACHINE, "versions": {"transformers": "5.19.0", "peft": "0.21.2"},
        "starts": started(), "rounds": rounds_of(seconds), "idle_shares": {"ours (steps)": 0.0001},
        **changes,
    }  # fmt: skip


def report_of(module, entries, *given):
    options = options_of(module, *given)
    options.stored = module("finetune.accounting").Stored(*STORED)
    return module("finetune.report").report(entries, options)


def test_report(module):
    slow = {**SECONDS, ("ours", "step"): 1.3}
    text = report_of(module, record(slow))
    lines = text.splitlines()
    assert lines[0].startswith(
        "2026-11-30, Xeon, 2 cores, 2 threads, torch 2.13.0, int4-lora 0.1.0, transformers 5.19.0, "
        "peft 0.21.2; a Llama of hidden 2048 with 16 layers for memory and `generate`, 4 for the "
    )
    assert "| step: ours over dense | <= 1.2 | 1.30 | **missed** |" in lines
    assert "| generate: tokens/s over dense | >= 2.5 | 2.50 | reached |" in lines
    assert "| step | ours | 1.300 ±0 % | 0.520 ±0 % | 0.650 ±0 % | 0.130 ±0 % | - |" in lines
    assert "| generate | dense | 5.000 ±0 % | - | - | - | 12.8 ±0 % |" in lines
    assert "| step | 1.30 | 1.30 | 1.00 |" in lines
    assert "| generate | 0.40 | - | - |" in lines
    assert "| ours | cached | 122 | 300 | 769 | 769 | 100 | 869 |" in lines
    assert "| forward | ours | cached | 1.000 | 3.000 | 1.500 | 1.000 | 3.00 |" in lines
    assert "- peak of training, ours over dense: 0.77" in lines
    assert "- losses of the first steps: dense 2.0000, 2.0000; ours 2.0000, 2.0000" in lines
    assert text.count("**missed**") == 1
    assert "not idle" not in text
    assert "compiled" not in text


def test_report_names_a_busy_contender_and_late_graphs(module):
    entries = record(idle_shares={"dense (steps)": 0.5, "ours (steps)": None})
    entries["rounds"][0]["rounds"] = [{**entries["rounds"][0]["cold"], "graphs": 2}]
    entries["rounds"][0]["rounds"] += [entries["rounds"][0]["cold"]] * 4
    text = report_of(module, entries, "--quick")
    assert "- dense (steps) was not idle while others ran: the times are not valid" in text
    assert "- dense compiled 2 graphs in measured rounds of step" in text
    assert "The bars are not judged: they are for hidden 2048" in text
    assert "**missed**" not in text
    assert "reached" not in text


def test_report_of_a_part(module):
    only_starts = report_of(module, record(rounds=[]))
    only_rounds = report_of(module, record(starts=[]))
    assert "medians of 5 rounds" not in only_starts
    assert "Memory of training" not in only_rounds
    assert only_starts.count("not measured") == 4
    assert only_rounds.count("not measured") == 3


def test_the_header_has_the_threads_of_the_processes(module, monkeypatch, tmp_path):
    command = module("finetune.__main__")
    files = SimpleNamespace(int4=tmp_path, dense=tmp_path)
    monkeypatch.setattr(command, "prepare", lambda *given: files)
    stored = module("finetune.accounting").Stored(*STORED)
    monkeypatch.setattr(command, "stored", lambda folder: stored)
    results = {name: record()[name] for name in ("starts", "rounds", "idle_shares")}
    monkeypatch.setattr(command, "measured", lambda *given: (results, 5))
    monkeypatch.setattr(module("machine"), "machine", lambda device: {**MACHINE, "threads": 1})
    before = torch.get_num_threads()
    options = options_of(module, "--threads", "1", "--cache", str(tmp_path))
    try:
        made = command.record_of(options)
    finally:
        torch.set_num_threads(before)
    assert "5 threads" in module("finetune.report").report(made, options)
    assert made["options"]["stored"] == dataclasses.asdict(stored)
    assert json.dumps(made)
    assert [row["reached"] for row in made["bars"]] == [True] * 7


@pytest.mark.parametrize(
    ("reached", "not_judged", "code"),
    [(True, None, 0), (None, None, 0), (False, None, 1), (False, "it is tiny", 0)],
)
def test_the_exit_code_says_whether_a_bar_is_missed(
    module, monkeypatch, tmp_path, capsys, reached, not_judged, code
):
    command = module("command")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    result = {"bars": [{"reached": True}, {"reached": reached}], "not_judged": not_judged}
    plot = lambda file: file.write_bytes(b"png")  # noqa: E731
    assert command.finish(None, result, "| table |", plot) == code
    assert capsys.readouterr().out == "| table |\n"
    assert not list(tmp_path.iterdir())
    assert command.finish("name", result, "| table |", plot) == code
    assert json.loads((tmp_path / "name.json").read_text()) == result
    assert (tmp_path / "name.md").read_text() == "| table |\n"
    assert (tmp_path / "name.png").exists() == bool(find_spec("matplotlib"))


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize("part", ["starts", "rounds", None])
def test_plot(module, tmp_path, part):
    entries = record() if part is None else record(**{part: []})
    module("finetune.report").plot(entries, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
