"""Make rows of tokens from a file of text or of JSON lines.

A file whose name ends in ``.jsonl``, ``.ndjson`` or ``.json`` holds a JSON object on each line,
which is a document; any other file is a document of plain text. A row holds tokens of only a single
document. Documents that are longer than a row are cut into several rows.

Source: ``docs/commands/train.md``; TRL's dataset formats, which have the same keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["NOT_TRAINED", "Data", "Row", "collate", "read_data"]

NOT_TRAINED = -100  # the label of tokens that add nothing to the loss, in torch and transformers
JSON_LINES = (".jsonl", ".ndjson", ".json")
KEYS = ("text", "prompt", "completion", "messages")
WANTED = 'it must have "text", or "prompt" and "completion", or "messages"'


@dataclass(frozen=True, eq=False)
class Row:
    """A row of tokens.

    Args:
        tokens: int64 ``[length]``.
        labels: int64 ``[length]``: the tokens, ``NOT_TRAINED`` for those that are not predicted.
    """

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """The rows to train on and to evaluate.

    Args:
        file: the file that was read.
        sha256: the digest of the file's bytes.
        rows_sha256: the digest of all rows: of the text, the tokenizer, the length and the split.
        documents: the number of documents.
        train: the rows to train on.
        evaluate: the rows to evaluate.
        notes: what was cut or left out, a sentence each.
    """

    file: Path
    sha256: str
    rows_sha256: str
    documents: int
    train: Sequence[Row]
    evaluate: Sequence[Row]
    notes: tuple[str, ...]


def read_data(
    file: str | os.PathLike[str],
    tokenizer: Any,
    *,
    length: int,
    vocabulary: int,
    eval_split: float = 0.0,
    seed: int = 0,
) -> Data:
    """Read a file and cut its documents into rows.

    Every document ends with the tokenizer's end-of-sequence token, if it has such a token. A prompt
    is not trained on. The evaluation split is of documents, drawn by the seed; of a single document
    it is the last rows.

    Args:
        file: UTF-8 text or JSON lines.
        tokenizer: a tokenizer of transformers.
        length: the most tokens of a row.
        vocabulary: the number of tokens that the model has embeddings for.
        eval_split: the share of the documents, or of the rows of a single document, to evaluate.
        seed: what draws the documents to evaluate.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file is empty, is not text, has a line of none of the three kinds, or leaves
            no rows to train on or to evaluate; the message names file and line.

    Example:
        >>> from transformers import AutoTokenizer  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained("my-model-W4A16")  # doctest: +SKIP
        >>> data = read_data("notes.txt", tokenizer, length=512, vocabulary=32000)  # doctest: +SKIP
        >>> len(data.train)  # doctest: +SKIP
        88

    Source:
        ``docs/commands/train.md``.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file with data")
    content = path.read_bytes()
    cutter = _Cutter(path, tokenizer, length)
    documents = [cutter.rows(document, where) for document, where in _documents(path, content)]
    largest = max((int(row.tokens.max()) for rows in documents for row in rows), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"{path}: the tokenizer gives token {largest}, and the model has {vocabulary} "
            "embeddings: the tokenizer is not the model's"
        )
    train, evaluate = _split(path, [rows for rows in documents if rows], eval_split, seed)
    digest = hashlib.sha256()
    for part in (train, evaluate):
        digest.update(f"{len(part)} rows\n".encode())
        for row in part:
            digest.update(torch.stack([row.tokens, row.labels]).numpy().tobytes())
    return Data(
        path,
        hashlib.sha256(content).hexdigest(),
        digest.hexdigest(),
        len(documents),
        train,
        evaluate,
        tuple(cutter.notes()),
    )


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return a batch, padded at the end of its shorter rows.

    Args:
        rows: the rows of the batch.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[rows, length of the longest]``.

    Example:
        >>> short, long = (Row(torch.arange(n), torch.arange(n)) for n in (1, 3))
        >>> collate([short, long])["attention_mask"].tolist()
        [[1, 0, 0], [1, 1, 1]]
    """

    def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)

    return {
        "input_ids": padded([row.tokens for row in rows], 0),
        "labels": padded([row.labels for row in rows], NOT_TRAINED),
        "attention_mask": padded([torch.ones_like(row.tokens) for row in rows], 0),
    }


class _Cutter:
    """Make rows of documents, and count those that are cut or left out.

    Args:
        file: the file, for messages.
        tokenizer: a tokenizer of transformers.
        length: the most tokens of a row.
    """

    def __init__(self, file: Path, tokenizer: Any, length: int) -> None:
        self.file, self.tokenizer, self.length = file, tokenizer, length
        self.cut = self.pieces = self.left_out = 0

    def rows(self, document: Mapping[str, Any], where: str) -> list[Row]:
        """Return the rows of a document; none if no token of it is predicted."""
        tokens, prompt = self._tokens(document, where)
        ids = torch.tensor(tokens, dtype=torch.int64)
        labels = ids.clone()
        labels[:prompt] = NOT_TRAINED
        rows = []
        for start in range(0, len(ids), self.length):
            part = labels[start : start + self.length].clone()
            part[:1] = NOT_TRAINED  # nothing predicts a row's first token
            if (part == NOT_TRAINED).all():
                self.left_out += 1
            else:
                rows.append(Row(ids[start : start + self.length], part))
        if len(ids) > self.length:
            self.cut += 1
            self.pieces += len(rows)
        return rows

    def notes(self) -> Iterator[str]:
        """Yield what was cut and left out, in sentences."""
        if self.cut:
            those = "1 document is" if self.cut == 1 else f"{self.cut} documents are"
            cut = "was cut" if self.cut == 1 else "were cut"
            yield (
                f"{self.file}: {those} longer than {self.length} tokens and {cut} into "
                f"{self.pieces} rows"
            )
        if self.left_out:
            yield f"{self.file}: rows left out, as nothing in them is predicted: {self.left_out}"

    def _tokens(self, document: Mapping[str, Any], where: str) -> tuple[list[int], int]:
        """Return the tokens of a document, and how many of them belong to its prompt."""
        if "messages" in document:
            return self._encode(self._chat(document["messages"], where), special=False), 0
        if "text" in document:
            return self._ended(self._encode(document["text"])), 0
        whole = self._ended(self._encode(document["prompt"] + document["completion"]))
        prompt = self._encode(document["prompt"])
        if prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt.pop()
        if whole[: len(prompt)] != prompt:  # a token would span the border
            whole = prompt + self._ended(self._encode(document["completion"], special=False))
        return whole, len(prompt)

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return ids

    def _ended(self, tokens: list[int]) -> list[int]:
        """Return tokens with the end-of-sequence token at their end."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

    def _chat(self, messages: Any, where: str) -> str:
        """Return the text of a conversation, as the tokenizer's template writes it."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f'{where} has "messages", and the tokenizer of the model has no chat template: '
                'write them out as "text", or as "prompt" and "completion"'
            )
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except ImportError:
            raise
        except Exception as error:  # templates raise their own
            raise ValueError(f"{where}: the chat template refuses the messages: {error}") from error
        return text


def _documents(file: Path, content: bytes) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each document with the name of its place."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte {error.start} cannot be decoded"
        ) from error
    if "\0" in text:
        raise ValueError(f"{file} is not text: character {text.index(chr(0))} is NUL")
    if not text.strip():
        raise ValueError(f"{file} is empty")
    if file.suffix.lower() not in JSON_LINES:
        yield {"text": text}, str(file)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _document(line, where), where


def _document(line: str, where: str) -> Mapping[str, Any]:
    """Return the document of a JSON line, checked."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a JSON object on a line of its own: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(document).__name__}")
    kept = {key: document[key] for key in KEYS if key in document}
    if set(kept) not in ({"text"}, {"prompt", "completion"}, {"messages"}):
        got = ", ".join(map(repr, kept or document)) or "no keys"
        raise ValueError(f"{where}: {WANTED}, got {got}")
    for key, value in kept.items():
        if key == "messages":
            _check_messages(value, where)
        elif not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a string, got {type(value).__name__}")
        elif not value and key != "prompt":
            raise ValueError(f"{where}: {key} is empty")
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"{where}: {key} holds half of a surrogate pair: no character")
    return kept


def _check_messages(messages: object, where: str) -> None:
    """Check that messages are a conversation; templates write a missing value as no text."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise ValueError(f"{where}: messages must be a list of objects")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: a message must have a role, got {', '.join(message)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"{where}: a message must have content, got {', '.join(message)}")


def _split(
    file: Path, documents: list[list[Row]], share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to evaluate."""
    if not documents:
        raise ValueError(f"{file} has no document of at least two tokens, to predict the second")
    parts = documents if len(documents) > 1 else [[row] for row in documents[0]]
    count = round(share * len(parts)) if share == 0 else max(1, round(share * len(parts)))
    if count >= len(parts):
        kind = "documents" if len(documents) > 1 else "rows"
        raise ValueError(
            f"{file}: an evaluation split of {share:g} leaves nothing to train on: it has "
            f"{len(parts)} {kind}"
        )
    order = list(range(len(parts)))
    if len(documents) > 1:
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[len(parts) - count :])
    train = [row for number, part in enumerate(parts) if number not in held for row in part]
    evaluate = [row for number, part in enumerate(parts) if number in held for row in part]
    return train, evaluate
