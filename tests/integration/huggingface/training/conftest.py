"""A tiny INT4 model with a tokenizer, and data for it."""

import json
import shutil

import pytest

from int4_lora.integration.demo.tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def model(square, tmp_path_factory):
    """Return the folder of a tiny INT4 model with a byte-level tokenizer."""
    folder = shutil.copytree(square("g128"), tmp_path_factory.mktemp("trained") / "model")
    save_tokenizer(folder, length=256)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model):
    """Return its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """Return a file of nine documents of different lengths, as JSON lines."""
    file = tmp_path_factory.mktemp("data") / "lines.jsonl"
    documents = [{"text": f"{number}: " + "the quick fox " * number} for number in range(8)]
    documents.append({"prompt": "2 + 2 = ", "completion": "4"})
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return file
