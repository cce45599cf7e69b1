"""Fine-tune an INT4 model with TRL's SFTTrainer; the model's weights stay packed.

    python examples/finetune_int4.py MODEL DATA.jsonl ADAPTER

DATA holds JSON lines that each have a "text". The program needs the extras ``checkpoints``, ``hf``
and ``train``, and TRL: ``python -m pip install trl``. ``int4-lora train`` does the same, and can be
resumed.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from int4_lora.integration.huggingface import load_packed

model, data, adapter = sys.argv[1:]
trainer = SFTTrainer(
    model=load_packed(model),
    processing_class=AutoTokenizer.from_pretrained(model),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    args=SFTConfig(
        output_dir=adapter,
        max_length=256,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        bf16=False,  # the model has its dtype; TRL would autocast, which needs a GPU
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
trainer.save_model(adapter)
