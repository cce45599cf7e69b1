"""Training runs: their losses are those of Trainer and PEFT, and a kill changes nothing."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from int4_lora.integration.adapter import read as adapters
from int4_lora.integration.adapter.quantize import quantize_adapter
from int4_lora.integration.checkpoint import inspect
from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.huggingface import load_packed
from int4_lora.integration.huggingface.training import DivergedError, Settings, train
from int4_lora.integration.huggingface.training import run as training
from int4_lora.integration.huggingface.training.base import base_digest, default_targets
from int4_lora.integration.huggingface.training.data import collate, read_data
from int4_lora.integration.huggingface.training.run_folder import RunFolder
from int4_lora.integration.huggingface.training.trainer import Keeper, arguments
from int4_lora.integration.huggingface.training.watch import Watch

SETTINGS = Settings(
    rank=4,
    length=32,
    steps=8,
    batch=3,
    accumulate=2,
    learning_rate=1e-3,
    eval_split=0.2,
    eval_every=4,
    save_every=3,
    dtype="float32",
    device="cpu",
)
TENSORS = "adapter_model.safetensors"


class Stopped(Exception):
    """Raised in place of a kill."""


class Recorder(Watch):
    """Keeps what it is told; stops the run after a step."""

    def __init__(self, stop_after=None):
        self.notes, self.losses, self.stop_after = [], [], stop_after

    def say(self, note):
        self.notes.append(note)

    def step(self, step, loss):
        self.losses.append((step, loss))
        if step == self.stop_after:
            raise Stopped


@pytest.fixture(scope="module")
def trained(model, lines, tmp_path_factory):
    """Return an adapter that was trained without a break."""
    return train(model, lines, tmp_path_factory.mktemp("whole") / "adapter", SETTINGS)


def bytes_of(trained):
    return (trained.output / TENSORS).read_bytes()


@pytest.mark.versions
def test_the_losses_are_those_of_trainer_and_peft_on_the_dequantised_model(
    trained, decompressed, tokenizer, lines, tmp_path
):
    """The issue's bound: 1e-4 relative, in float32."""
    data = read_data(lines, tokenizer, length=32, vocabulary=512, eval_split=0.2)
    dense = copy.deepcopy(decompressed("g128"))
    transformers.set_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = transformers.Trainer(
        model=peft.get_peft_model(dense, config),
        args=arguments(SETTINGS, RunFolder(tmp_path / "dense"), evaluates=True),
        train_dataset=data.train,
        eval_dataset=data.evaluate,
        data_collator=collate,
    )
    stock.train()
    for kind, key in (("losses", "loss"), ("evaluations", "eval_loss")):
        ours = [entry["loss"] for entry in trained.report[kind]]
        theirs = [entry[key] for entry in stock.state.log_history if key in entry]
        assert len(ours) == len(theirs) > 1
        for mine, expected in zip(ours, theirs, strict=True):
            assert abs(mine - expected) <= 1e-4 * expected
    assert ours[-1] < ours[0]


@pytest.mark.versions
def test_the_first_loss_is_the_mean_over_all_predicted_tokens(model, decompressed, tmp_path):
    """Of rows of different lengths, in batches that a step sums: the token is the unit."""
    file = tmp_path / "two.jsonl"
    texts = ["a" * 30, "the quick"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = Settings(steps=1, batch=1, accumulate=2, length=64, dtype="float32", device="cpu")
    report = train(model, file, tmp_path / "adapter", settings).report
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = decompressed("g128")(ids).logits[0, :-1].double()
        losses.append(-logits.log_softmax(-1).gather(1, ids[0, 1:, None]))
    expected = float(torch.cat(losses).mean())
    assert abs(report["losses"][0]["loss"] - expected) <= 1e-4 * expected
    assert [len(one) for one in losses] == [30, 9]


def test_the_folder_holds_the_adapter_and_the_report(trained, model, lines):
    names = {path.name for path in trained.output.iterdir()}
    assert {TENSORS, "adapter_config.json", "training.json"} <= names
    assert not trained.output.with_name("adapter.partial").exists()
    config = json.loads((trained.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    report = json.loads((trained.output / "training.json").read_text())
    assert report == trained.report
    assert [entry["step"] for entry in report["losses"]] == list(range(1, 9))
    assert [entry["step"] for entry in report["evaluations"]] == [0, 4, 8]
    assert report["data"]["documents"] == 9
    assert report["settings"]["targets"] == [
        f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")
    ]
    checkpoint, adapter = open_checkpoint(model), adapters.read_adapter(trained.output)
    assert inspect.inspect(checkpoint, [adapter], []).right


@pytest.mark.versions
@pytest.mark.parametrize("stop_after", [1, 5])  # before the first checkpoint, and between two
def test_a_resumed_run_ends_with_the_same_adapter(trained, model, lines, tmp_path, stop_after):
    output = tmp_path / "adapter"
    with pytest.raises(Stopped):
        train(model, lines, output, SETTINGS, watch=Recorder(stop_after))
    assert not output.exists()
    partial = tmp_path / "adapter.partial"
    if stop_after < SETTINGS.save_every:
        assert not partial.exists()
        return
    assert {path.name for path in partial.iterdir()} >= {"run.json", "checkpoint-3"}
    begun = partial / "writing" / "checkpoint-6"  # as a kill leaves it while it is written
    begun.mkdir(parents=True)
    (begun / TENSORS).write_bytes(b"cut off")
    recorder = Recorder()
    resumed = train(model, lines, output, SETTINGS, resume=True, watch=recorder)
    assert [step for step, _ in recorder.losses] == [4, 5, 6, 7, 8]
    assert "continuing after checkpoint-3" in recorder.notes
    assert bytes_of(resumed) == bytes_of(trained)
    assert resumed.report == trained.report
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.nightly
@pytest.mark.parametrize("checkpoint", ["checkpoint-3", "checkpoint-6"])
def test_a_killed_run_is_resumed_to_the_same_adapter(trained, model, lines, tmp_path, checkpoint):
    output = tmp_path / "adapter"
    program = "import sys; from int4_lora.integration.cli.app import app; app(sys.argv[1:])"
    options = [
        *("--rank=4", "--length=32", "--steps=8", "--batch=3", "--accumulate=2", "--device=cpu"),
        *("--learning-rate=1e-3", "--eval-split=0.2", "--eval-every=4", "--save-every=3"),
        "--dtype=float32",
    ]
    command = [sys.executable, "-c", program, "train", model, lines, "--output", output, *options]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    kept = tmp_path / "adapter.partial" / checkpoint
    while not kept.exists() and child.poll() is None:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not output.exists()
    assert (kept.parent / "lock").exists()
    load_file(kept.parent / checkpoint / TENSORS)
    subprocess.run([*map(str, command), "--resume"], check=True, capture_output=True)
    assert (output / TENSORS).read_bytes() == bytes_of(trained)


@pytest.fixture
def unfinished(model, lines, tmp_path):
    """Return the output of a run that was stopped after its checkpoint."""
    output = tmp_path / "runs" / "adapter"
    with pytest.raises(Stopped):
        train(model, lines, output, SETTINGS, watch=Recorder(stop_after=4))
    return output


def files_in(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_run_that_differs_is_not_resumed(unfinished, model, lines, tmp_path, monkeypatch):
    before = files_in(unfinished.parent)
    monkeypatch.setattr(training, "load_packed", None)  # nothing is loaded

    def refused(message, model=model, data=lines, **changes):
        with pytest.raises(ValueError, match=message):
            train(model, data, unfinished, replace(SETTINGS, **changes), resume=True)

    refused("learning_rate differs: .* has 0.001, this command 0.002", learning_rate=2e-3)
    refused("rank differs: the unfinished run has 4, this command 8", rank=8)
    refused('dtype differs: .* "float32", this command "bfloat16"', dtype="bfloat16")
    refused(r'targets differs: .*, this command \["q_proj"\]', targets=("q_proj",))
    other = tmp_path / "lines.jsonl"
    other.write_text(lines.read_text().replace("fox", "dog"))
    refused(r"data \(sha256\) differs", data=other)
    base = tmp_path / "other"
    copy_with_other_scales(model, base)
    refused("base .* differs", model=base)
    with pytest.raises(FileExistsError, match="holds an unfinished run: --resume continues it"):
        train(model, lines, unfinished, SETTINGS)
    assert files_in(unfinished.parent) == before


def copy_with_other_scales(model, folder):
    """Copy a model, with one scale changed."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][3, 0] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_force_begins_again_and_replaces(unfinished, model, lines):
    settings = Settings(rank=2, steps=2, length=32, dtype="float32", device="cpu")
    unfinished.mkdir()
    (unfinished / "mine").write_text("kept until the new adapter is whole")
    with pytest.raises(FileExistsError, match="adapter is there: --force replaces it"):
        train(model, lines, unfinished, settings)
    with pytest.raises(Stopped):
        train(model, lines, unfinished, settings, force=True, watch=Recorder(stop_after=2))
    assert (unfinished / "mine").exists()
    done = train(model, lines, unfinished, settings, resume=True, force=True)
    assert not (unfinished / "mine").exists()
    assert [path.name for path in unfinished.parent.iterdir()] == ["adapter"]
    assert load_file(done.output / TENSORS)[
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ].shape == (2, 256)


REFUSED = {
    "a folder that is no checkpoint": ({"model": "empty"}, OSError, "config.json"),
    "no data": ({"data": "missing.txt"}, OSError, "missing.txt is not a file with data"),
    "a length that the model does not take": (
        {"length": 257},
        ValueError,
        "length must be at most 256, the max_position_embeddings",
    ),
    "CUDA that is absent": ({"device": "cuda"}, ValueError, "torch sees no CUDA GPU"),
    "nothing to resume": ({"resume": True}, OSError, "holds no unfinished run to resume"),
    "an output inside the model": ({"output": "model/adapter"}, ValueError, "must be apart from"),
    "data inside the output": ({"output": "."}, ValueError, "must be apart from"),
    "modules that are not there": ({"targets": ("w7",)}, ValueError, "no module named w7"),
    "a module of several that is not there": (
        {"targets": ("q_proj", "v_prj", "w7")},
        ValueError,
        "the model has no module named v_prj, w7",
    ),
    "a rank above those of the layers": (
        {"rank": 257},
        ValueError,
        "rank must be at most 256, the highest that a linear layer of the model can have, got 257",
    ),
    "a rank above any float": ({"rank": 10**400}, ValueError, "rank must be at most 256"),
    "an adapter in place of the model": (
        {"model": "an adapter"},
        OSError,
        "the folder holds an adapter, which .* takes, and --start-from of train",
    ),
    "all-linear beside others": (
        {"targets": ("all-linear", "lm_head")},
        ValueError,
        "no module named all-linear; all-linear stands alone",
    ),
    "an adapter to start from that is not there": (
        {"start_from": "nowhere"},
        OSError,
        "nowhere is not a folder with an adapter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(model, tmp_path, monkeypatch, name):
    given, kind, message = REFUSED[name]
    if torch.cuda.is_available() and given.get("device") == "cuda":
        pytest.skip("there is a GPU")
    desk = tmp_path / "desk"
    desk.mkdir()
    (desk / "model").symlink_to(model)
    (desk / "empty").mkdir()
    (desk / "data.txt").write_text("the quick fox")
    monkeypatch.chdir(desk)
    (desk / "an adapter").mkdir()
    (desk / "an adapter" / "adapter_config.json").write_text("{}")
    before = sorted(desk.iterdir())
    names = ("length", "device", "targets", "rank")
    settings = {key: given[key] for key in names if key in given}
    monkeypatch.setattr(training, "load_packed", None)  # nothing is loaded
    with pytest.raises(kind, match=message):
        train(
            given.get("model", "model"),
            given.get("data", "data.txt"),
            given.get("output", "adapter"),
            Settings(**settings),
            start_from=given.get("start_from"),
            resume=given.get("resume", False),
        )
    assert sorted(desk.iterdir()) == before


def test_a_model_without_a_tokenizer_is_refused(square, lines, tmp_path):
    with pytest.raises(ValueError, match="transformers loads no tokenizer"):
        train(square("g128"), lines, tmp_path / "adapter", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(model, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains in one process"):
        train(model, lines, tmp_path / "adapter", SETTINGS)


def test_two_runs_do_not_write_one_adapter(model, lines, tmp_path):
    class Second(Watch):
        def step(self, step, loss):
            with pytest.raises(FileExistsError, match="another run writes there"):
                train(model, lines, tmp_path / "adapter", SETTINGS, resume=True)
            raise Stopped

    with pytest.raises(Stopped):
        train(model, lines, tmp_path / "adapter", SETTINGS, watch=Second())


@pytest.mark.versions
def test_a_loss_that_is_not_finite_stops_the_run(model, lines, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e37, save_every=1, eval_split=0.0)
    with pytest.raises(DivergedError, match=r"not finite .* in step 2; the last good") as error:
        train(model, lines, tmp_path / "adapter", settings)
    assert error.value.step == 2
    assert error.value.checkpoint == tmp_path / "adapter.partial" / "checkpoint-1"
    assert error.value.checkpoint.is_dir()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.versions
@pytest.mark.parametrize(
    ("share", "error"),
    [(0.5, "SafetensorError"), (1.5, "RuntimeError"), (None, "OSError")],
    ids=["in the adapter", "in the optimizer's state", "in fsync"],
)
def test_a_full_disk_is_named_and_leaves_the_last_whole_checkpoint(
    trained, model, lines, tmp_path, monkeypatch, share, error
):
    """A limit on the size of files fails a write as a full disk does."""
    resource = pytest.importorskip("resource")
    output, limits = tmp_path / "adapter", resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Watch):
        def step(self, step, loss):
            if step != 5:
                return
            if share is None:
                monkeypatch.setattr("int4_lora.atomic_files.os.fsync", no_space)
            else:
                size = int(share * len(bytes_of(trained)))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        with pytest.raises(
            OSError, match=r"adapter.partial cannot be written: .*; --resume continues checkpoint-3"
        ) as raised:
            train(model, lines, output, SETTINGS, watch=Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert type(raised.value.__cause__).__name__ == error
    kept = {path.name for path in (tmp_path / "adapter.partial").iterdir()}
    assert kept - {"lock"} == {"run.json", "checkpoint-3"}
    assert bytes_of(train(model, lines, output, SETTINGS, resume=True)) == bytes_of(trained)


def test_at_each_moment_a_whole_checkpoint_has_its_name(tmp_path, monkeypatch):
    """Each call that changes names or removes files is a moment at which a kill may come."""
    folder, seen = RunFolder(tmp_path / "adapter"), []

    def watched(change):
        def called(*args, **settings):
            last = folder.last_checkpoint()
            seen.append(last is not None and len(list(last.iterdir())) == 2)
            return change(*args, **settings)

        return called

    def keep(step):
        written = folder.writing / f"checkpoint-{step}"
        written.mkdir(parents=True)
        for name in ("adapter", "state"):
            (written / name).write_text("whole")
        folder.keep(step)

    keep(3)
    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    keep(3)
    keep(6)
    assert len(seen) > 4
    assert all(seen)
    assert folder.last_checkpoint().name == "checkpoint-6"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_stop_the_run(tmp_path, value):
    """Also where the loss is finite: the step would spoil the adapter."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, value]])
    keeper = Keeper(RunFolder(tmp_path / "adapter"), Watch())
    state = transformers.TrainerState(global_step=4)
    with pytest.raises(DivergedError, match=r"gradients are not finite .* in step 5; none was"):
        keeper.on_pre_optimizer_step(None, state, None, model=layer)
    layer.weight.grad.fill_(1)
    keeper.on_pre_optimizer_step(None, state, None, model=layer)


@pytest.mark.versions
def test_an_adapter_is_trained_further(trained, model, lines, tmp_path):
    settings = replace(SETTINGS, rank=None, steps=2)
    further = train(model, lines, tmp_path / "adapter", settings, start_from=trained.output)
    assert further.report["settings"]["rank"] == 4
    assert further.report["start_from"] == str(trained.output)
    assert further.report["losses"][0]["loss"] < trained.report["losses"][0]["loss"]
    with pytest.raises(ValueError, match="rank is that of the adapter to start from"):
        train(model, lines, tmp_path / "other", SETTINGS, start_from=trained.output)


def test_an_adapter_of_another_base_is_refused(trained, model, lines, tmp_path):
    settings = replace(SETTINGS, rank=None)
    base = tmp_path / "base"
    copy_with_other_scales(model, base)
    with pytest.raises(ValueError, match="the adapter is of another base"):
        train(base, lines, tmp_path / "adapter", settings, start_from=trained.output)


def test_an_adapter_of_other_shapes_is_refused(model, lines, tiny_adapters, tmp_path):
    settings = replace(SETTINGS, rank=None)
    with pytest.raises(ValueError, match=r"\[(128|256|512), "):
        train(model, lines, tmp_path / "adapter", settings, start_from=tiny_adapters["b"])
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_in_int4_is_not_trained_further(model, lines, tiny_adapters, tmp_path):
    quantize_adapter(tiny_adapters["b"], tmp_path / "int4")
    settings = replace(SETTINGS, rank=None)
    with pytest.raises(ValueError, match=r"int4 is an adapter in INT4, .* adapter dequantize"):
        train(model, lines, tmp_path / "adapter", settings, start_from=tmp_path / "int4")
    assert not (tmp_path / "adapter").exists()


def test_warnings_of_the_model_are_notes_told_once(model, lines, tmp_path, monkeypatch):
    def warns(*args, **settings):
        for _ in range(2):
            warnings.warn("these quantised modules stay as they are: lm_head", stacklevel=2)
        return load_packed(*args, **settings)

    monkeypatch.setattr(training, "load_packed", warns)
    recorder = Recorder()
    settings = Settings(steps=1, length=32, dtype="float32", device="cpu")
    report = train(model, lines, tmp_path / "adapter", settings, watch=recorder).report
    told = [note for note in recorder.notes if "stay as they are" in note]
    assert len(told) == 1
    assert told[0] in report["notes"]


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight_packed", "embed_tokens.weight", "norm.weight"]
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_base_that_differs_elsewhere_than_in_scales_is_another(model, tmp_path, name, place):
    """As GPTQ's codes differ from rounding to nearest with the same scales."""
    folder = shutil.copytree(model, tmp_path / "other")
    assert base_digest(open_checkpoint(folder)) == base_digest(open_checkpoint(model))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{name}"].view(-1)[place] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert base_digest(open_checkpoint(folder)) != base_digest(open_checkpoint(model))


@pytest.mark.parametrize("where", ["lora_metadata.json", "config.json"])
def test_the_modules_are_those_that_the_checkpoint_suggests(model, tmp_path, where):
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / where
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= {"lora_target_modules": ["k_proj"], "suggested_lora_targets": ["q_proj"]}
    file.write_text(json.dumps(content))
    assert default_targets(open_checkpoint(folder)) == ("q_proj",)
    file.write_text(json.dumps({**content, "suggested_lora_targets": []}))
    assert default_targets(open_checkpoint(folder)) == ("k_proj",)


@pytest.mark.versions
def test_checkpointing_computes_the_same_losses(trained, model, lines, tmp_path):
    settings = replace(SETTINGS, checkpointing=True)
    report = train(model, lines, tmp_path / "adapter", settings).report
    for mine, expected in zip(report["losses"], trained.report["losses"], strict=True):
        assert abs(mine["loss"] - expected["loss"]) <= 1e-6 * expected["loss"]


def test_the_losses_are_drawn(model, lines, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    settings = Settings(steps=2, length=32, eval_split=0.2, dtype="float32", device="cpu")
    trained = train(model, lines, tmp_path / "adapter", settings, plot=True)
    data = (trained.output / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (960, 540)
    monkeypatch.setattr("int4_lora.integration.huggingface.training.plot.find_spec", lambda _: None)
    with pytest.raises(ImportError, match="python -m pip install matplotlib"):
        train(model, lines, tmp_path / "other", settings, plot=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
