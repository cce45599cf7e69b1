"""The layout of a result's files: how many bytes a file holds, and where its tensors begin."""

from typing import ClassVar

import pytest

from int4_lora.integration.conversion.result_files import index_of, lay_out
from int4_lora.integration.conversion.tasks import OutputTensor, Task


class Made(Task):
    """Tensors of given names and sizes, which are never made."""

    sources: ClassVar = {}
    consumed: ClassVar = ()

    def __init__(self, dtype, **sizes):
        self.outputs = tuple(OutputTensor(name, dtype, (size,)) for name, size in sizes.items())

    def run(self, write):
        raise AssertionError("files are laid out without making a tensor")


def test_a_file_holds_at_most_so_many_bytes_or_one_task():
    tasks = [
        Made("U8", **{name: size}) for name, size in zip("abcd", (40, 60, 1, 200), strict=True)
    ]
    tasks.append(Made("U8", e=10, f=90))
    files = lay_out(tasks, most_bytes=100)
    assert {file.name: [*file.places] for file in files} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e", "f"],
    }
    index = index_of(files)
    assert index["metadata"] == {"total_size": 401}
    assert index["weight_map"]["f"] == "model-00004-of-00004.safetensors"


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_begin_at_multiples_of_their_items(length):
    tasks = [Made("U8", **{"x" * length: 3}), Made("BF16", y=5), Made("F32", z=1), Made("I64", w=2)]
    (file,) = lay_out(tasks, most_bytes=10**9)
    items = {"x" * length: 1, "y": 2, "z": 4, "w": 8}
    assert all(place % items[name] == 0 for name, place in file.places.items())
    assert file.size == len(file.header) + 3 + 10 + 4 + 16
