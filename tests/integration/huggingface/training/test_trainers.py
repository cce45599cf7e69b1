"""Trainer and TRL's SFTTrainer, unpatched, on a packed model: losses as on the dense model.

``test_run.py`` compares Trainer without checkpointing.
"""

import copy
import dataclasses
import json
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers

from int4_lora.integration.huggingface import load_packed
from int4_lora.integration.huggingface.training.data import collate, read_data

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),  # Trainer's, without a GPU
]
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
FOLLOWS = 1e-4  # relative, in float32: the issue's


@pytest.fixture
def models(model, decompressed):
    """Return the packed model and the dense one."""
    return load_packed(model, dtype=torch.float32), copy.deepcopy(decompressed("g128"))


def assert_follows(ours, theirs):
    assert len(ours) == len(theirs) > 1
    for mine, expected in zip(ours, theirs, strict=True):
        assert abs(mine - expected) <= FOLLOWS * expected
    assert ours[-1] < ours[0]


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def checkpointing(*, reentrant):
    """Return Trainer's arguments for it, under the names of the installed version."""
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in known else "gradient"
    return {
        f"{kind}_checkpointing": True,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_checkpointing(models, tokenizer, lines, tmp_path, reentrant):
    rows = read_data(lines, tokenizer, length=32, vocabulary=512).train
    losses = []
    for dense in models:
        if reentrant:
            dense.enable_input_require_grads()  # transformers 4 leaves it to the script
        transformers.set_seed(0)
        adapted = peft.get_peft_model(dense, peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG))
        settings = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            label_names=["labels"],
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **checkpointing(reentrant=reentrant),
        )
        trainer = transformers.Trainer(
            model=adapted, args=settings, train_dataset=rows, data_collator=collate
        )
        losses.append(losses_of(trainer))
    assert_follows(*losses)


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed")
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer(models, tokenizer, tmp_path, monkeypatch):
    import datasets
    import trl

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["the quick brown fox " * (1 + number % 3) for number in range(8)]
    losses = []
    for dense in models:
        trainer = trl.SFTTrainer(
            model=dense,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            peft_config=peft.LoraConfig(**CONFIG),
            args=trl.SFTConfig(
                str(tmp_path / "run"),
                max_length=64,
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
        )
        losses.append(losses_of(trainer))
    assert_follows(*losses)
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4
