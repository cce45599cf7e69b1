"""The header of a safetensors file: what the library refuses is refused, in words and at once."""

import json
from unittest import mock

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from int4_lora.integration.checkpoint.safetensors_files import read_tensor
from int4_lora.integration.checkpoint.safetensors_header import read_headers


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = [
    ("its header is no object", [1]),
    ("x must be an object, got 3", {"x": 3}),
    ("x must have a dtype of the format, got 'U7'", {"x": entry("U7")}),
    ("x must have a dtype of the format, got None", {"x": {"shape": [4], "data_offsets": [0, 4]}}),
    (r"x must have a shape of lengths, got \[-1\]", {"x": entry(shape=[-1])}),
    (r"x must have a shape of lengths, got \[True\]", {"x": entry(shape=[True])}),
    (r"x must have two data_offsets, got \[0\]", {"x": entry(offsets=[0])}),
    (r"must have data_offsets of 4 bytes, got \[0, 5\]", {"x": entry(offsets=[0, 5])}),
    (r"must have data_offsets of 4 bytes, got \[4, 0\]", {"x": entry(offsets=[4, 0])}),
    ("without gap or overlap: y begins at byte", {"x": entry(), "y": entry(offsets=[3, 7])}),
    ("without gap or overlap: y begins at byte", {"x": entry(), "y": entry(offsets=[5, 9])}),
    ("its tensors end at byte", {"x": entry(), "y": entry(offsets=[4, 8])}),
    ("its tensors end at byte", {}),
]


@pytest.mark.parametrize(("message", "header"), BAD_HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, message, header):
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(ValueError, match=rf"x\.safetensors: not a readable .*{message}"):
        read_headers(file)
    with pytest.raises(SafetensorError):  # the library refuses it too
        load_file(file)


def test_headers_that_only_python_could_misread_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    one = json.dumps(entry())
    for message, text in (
        ("a key stands twice", f'{{"x": {one}, "x": {one}}}'),
        ("its header is not JSON", "[" * 100_000),
        ("its header is not JSON", '{"x"'),
    ):
        raw = text.encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"1234")
        with pytest.raises(ValueError, match=message):
            read_headers(file)
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"at most {32 * 2**20} bytes are read of a header"):
        read_headers(file)


def test_many_tensors_in_one_file_take_time_in_proportion(tmp_path):
    """The header is read once, not for each tensor; and no file is too large to be mapped."""
    count, text = 20_000, {}
    for index in range(count):
        text[f"model.layers.0.mlp.experts.{index}.down_proj.weight"] = entry(
            offsets=[4 * index, 4 * index + 4]
        )
    text["huge"] = entry("U8", [2**42], [4 * count, 4 * count + 2**42])
    raw = json.dumps(text).encode()
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write(len(raw).to_bytes(8, "little") + raw)
        opened.truncate(8 + len(raw) + 4 * count + 2**42)
    headers = read_headers(file)
    assert len(headers) == count + 1
    with mock.patch.object(json, "loads", side_effect=AssertionError):
        assert all(not read_tensor(headers[name], name).any() for name in list(headers)[:2000])
