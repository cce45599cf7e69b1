"""Rows of tokens from text and JSON lines.

Tokens are worked out by hand: the tokenizer's first four are special, 2 ends a document, and the
bytes from "!" (33) on follow in their order, so "a" (97) is token 68.
"""

import copy
import json

import pytest
import torch

from int4_lora.integration.huggingface.training.data import Row, collate, read_data

END, A, B, C = 2, 68, 69, 70


@pytest.fixture
def read(tokenizer, tmp_path):
    """Return a function that writes a file and reads its data."""

    def call(content, name="data.jsonl", using=tokenizer, **settings):
        file = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_data(file, using, **{"length": 8, "vocabulary": 512, **settings})

    return call


def plain(rows):
    return [(row.tokens.tolist(), row.labels.tolist()) for row in rows]


def test_a_text_file_is_a_document(read):
    data = read("abc", "data.txt")
    assert plain(data.train) == [([A, B, C, END], [-100, B, C, END])]
    assert (data.documents, data.evaluate, data.notes) == (1, [], ())


def test_json_lines_are_documents_and_prompts_are_not_trained(read):
    data = read([{"text": "ab"}, {"prompt": "ab", "completion": "c", "id": 7}])
    assert plain(data.train) == [
        ([A, B, END], [-100, B, END]),
        ([A, B, C, END], [-100, -100, C, END]),
    ]


def test_an_empty_prompt_is_no_prompt(read):
    data = read([{"prompt": "", "completion": "ab"}])
    assert plain(data.train) == [([A, B, END], [-100, B, END])]


class Joining:
    """A tokenizer with one more token, "ab"."""

    eos_token_id, chat_template = END, None

    def __call__(self, text, **_):
        parts = text.replace("ab", "+")
        return {"input_ids": [9 if part == "+" else A + ord(part) - ord("a") for part in parts]}


def test_no_token_spans_the_end_of_a_prompt(read):
    """Asked for a completion, the model continues the tokens of the prompt alone."""
    data = read([{"prompt": "a", "completion": "bab"}], using=Joining())
    assert plain(data.train) == [([A, B, 9, END], [-100, B, 9, END])]


def test_blank_lines_and_a_byte_order_mark_are_ignored(read):
    data = read(b'\xef\xbb\xbf\n{"text": "ab"}\r\n\n  \n{"text": "c"}\n')
    assert [tokens for tokens, _ in plain(data.train)] == [[A, B, END], [C, END]]


def test_a_line_separator_inside_a_string_does_not_end_the_line(read):
    assert read('{"text": "a\u2028b"}').documents == 1


def test_longer_documents_are_cut_with_a_note(read):
    data = read([{"text": "abc" * 3}, {"text": "a"}], length=4)
    assert plain(data.train) == [
        ([A, B, C, A], [-100, B, C, A]),
        ([B, C, A, B], [-100, C, A, B]),
        ([C, END], [-100, END]),
        ([A, END], [-100, END]),
    ]
    (note,) = data.notes
    assert note.endswith("data.jsonl: 1 document is longer than 4 tokens and was cut into 3 rows")
    data = read([{"text": "abcabc"}, {"text": "abcab"}, {"text": "ab"}], length=4)
    (note,) = data.notes
    assert note.endswith("2 documents are longer than 4 tokens and were cut into 4 rows")


def test_rows_without_anything_to_predict_are_left_out(read):
    data = read([{"prompt": "abcabc", "completion": "a"}, {"text": "abc"}], length=3)
    assert plain(data.train) == [([A, END], [-100, END]), ([A, B, C], [-100, B, C])]
    cut, left_out = data.notes
    assert "2 documents are longer than 3 tokens and were cut into 2 rows" in cut
    assert "nothing in them is predicted: 3" in left_out


def test_messages_go_through_the_chat_template(read, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
    messages = [{"role": "b", "content": "c"}, {"role": "a", "content": "b"}]
    with pytest.raises(ValueError, match=r"line 1 has \"messages\", .* no chat template"):
        read([{"messages": messages}])
    monkeypatch.setattr(tokenizer, "chat_template", template)
    data = read([{"messages": messages}])
    assert plain(data.train) == [([B, C, END, A, B, END], [-100, C, END, A, B, END])]
    broken = "{{ raise_exception('no system') }}"
    monkeypatch.setattr(tokenizer, "chat_template", broken)
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses .* no system"):
        read([{"messages": messages}])


def test_a_batch_is_padded_at_its_ends():
    short, long = (Row(torch.arange(5, 5 + count), torch.arange(5, 5 + count)) for count in (2, 3))
    batch = collate([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7]]
    assert batch["labels"].tolist() == [[5, 6, -100], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_evaluation_split_is_of_documents(read):
    documents = [{"text": chr(97 + number) * 20} for number in range(10)]
    data = read(documents, eval_split=0.3, seed=1)
    of = [{int(row.tokens[0]) for row in rows} for rows in (data.train, data.evaluate)]
    assert (len(of[0]), len(of[1])) == (7, 3)
    assert not of[0] & of[1]
    assert len(data.evaluate) == 9  # 21 tokens each
    again = read(documents, eval_split=0.3, seed=1)
    assert again.rows_sha256 == data.rows_sha256
    assert read(documents, eval_split=0.3, seed=2).rows_sha256 != data.rows_sha256


def test_the_evaluation_split_of_a_text_is_its_end(read):
    data = read("abc" * 8, "data.txt", length=5, eval_split=0.2)
    assert [len(row.tokens) for row in data.train] == [5, 5, 5, 5]
    assert plain(data.evaluate) == [([C, A, B, C, END], [-100, A, B, C, END])]


REFUSED = {
    "nothing": ("", r"data\.jsonl is empty"),
    "blanks": (" \n\n", "is empty"),
    "bytes": (b'{"text": "\xff"}', r"is not UTF-8 text: byte 10"),
    "NUL": (b"a\0b", "is not text: character 1 is NUL"),
    "no JSON": ('{"text": "a"}\nhello', "line 2 is not a JSON object on a line of its own"),
    "an array": ('[{"text": "a"}]', "line 1 must be a JSON object, got list"),
    "an object over lines": ('{\n"text": "a"}', "line 1 is not a JSON object"),
    "no text": ('{"content": "a"}', r"line 1: it must have \"text\", .* got 'content'"),
    "no keys": ("{}", "got no keys"),
    "half a pair": ('{"prompt": "a"}', "line 1: it must have .* got 'prompt'"),
    "two kinds": ('{"text": "a", "messages": []}', "got 'text', 'messages'"),
    "a number": ('{"text": 5}', "line 1: text must be a string, got int"),
    "null": ('{"text": null}', "text must be a string, got NoneType"),
    "an empty text": ('{"text": ""}', "line 1: text is empty"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', "completion is empty"),
    "chat as a prompt": ('{"prompt": [], "completion": "a"}', "prompt must be a string, got list"),
    "no messages": ('{"messages": []}', "messages must be a list of objects"),
    "messages of another format": (
        '{"messages": [{"from": "human", "value": "a"}]}',
        "line 1: a message must have a role, got from, value",
    ),
    "messages without content": (
        '{"messages": [{"role": "user", "text": "a"}]}',
        "line 1: a message must have content, got role, text",
    ),
    "messages whose content is null": (
        '{"messages": [{"role": "user", "content": null}]}',
        "line 1: a message must have content, got role, content",
    ),
    "half a surrogate pair": (
        '{"text": "a"}\n{"text": "a\\ud800b"}',
        "line 2: text holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_text_is_refused(read, name):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read(content)


def test_a_file_that_is_not_there_is_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt is not a file with data"):
        read_data(tmp_path / "nowhere.txt", tokenizer, length=8, vocabulary=512)
    with pytest.raises(FileNotFoundError, match="is not a file with data"):
        read_data(tmp_path, tokenizer, length=8, vocabulary=512)


def test_a_document_of_a_single_token_teaches_nothing(read, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no document of at least two tokens"):
        read("a", "data.txt", using=endless)


def test_a_split_that_leaves_nothing_is_refused(read):
    for content, share in (([{"text": "ab"}], 0.1), ([{"text": "ab"}] * 3, 0.9)):
        with pytest.raises(ValueError, match="leaves nothing to train on"):
            read(content, eval_split=share)


def test_the_tokenizer_of_another_model_is_refused(read):
    with pytest.raises(ValueError, match="gives token 70, and the model has 70 embeddings"):
        read("abc", "data.txt", vocabulary=70)
