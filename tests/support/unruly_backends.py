"""Backends that break the rules of a call: they crash, hang, or return unusual tensors."""

import ctypes
import os
import time

import torch

import int4_lora.reference as reference


class Unruly:
    """It crashes in ``pack``, exits in ``unpack``, hangs in ``shrink``, and is right elsewhere."""

    def pack(self, codes, *, dim=1):
        ctypes.string_at(0)

    def unpack(self, packed, size, *, dim=1):
        os._exit(0)

    def shrink(self, x, lora, adapter_ids):
        time.sleep(1000)

    expand = staticmethod(reference.expand)


class Linear:
    """A layer whose right result is passed through ``change``."""

    def int4_linear(self, x, weight, bias=None):
        return self.change(reference.int4_linear(x, weight, bias), x, weight)


class View(Linear):
    def change(self, y, x, weight):
        return x[:, : y.shape[1]]


class ShortView(Linear):
    def change(self, y, x, weight):
        return x[1:]


class Expanded(Linear):
    def change(self, y, x, weight):
        return y[:1].expand(y.shape)


class Transposed(Linear):
    def change(self, y, x, weight):
        return y.T.contiguous().T


class TransposedDeclared(Transposed):
    manifest = {"contiguous": False}  # noqa: RUF012


class Subclass(Linear):
    def change(self, y, x, weight):
        return torch.nn.Parameter(y)


class Sparse(Linear):
    def change(self, y, x, weight):
        return y.to_sparse()


class OtherDevice(Linear):
    def change(self, y, x, weight):
        return y.to("meta")


class Transposes(Linear):
    """It transposes its operand in place."""

    def change(self, y, x, weight):
        weight.packed.t_()
        return y


class EmptiesSlices:
    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        y = reference.int4_lora_linear(x, weight, lora, adapter_ids, bias)
        if isinstance(lora, list):
            lora.clear()
        return y


class Forks:
    """Its ``pack`` returns in two processes; its ``unpack`` starts a process and crashes."""

    def pack(self, codes, *, dim=1):
        os.fork()
        return reference.pack(codes, dim=dim)

    def unpack(self, packed, size, *, dim=1):
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(3)

    expand = staticmethod(reference.expand)


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


RAISED = {
    "not unicode": ValueError("\ud800\x1b[2J"),
    "long": ValueError("x" * 5_000_000),
    "mute": Mute(),
    "no exception": GeneratorExit(),
    "exit": SystemExit(0),
}


class Raises:
    """It raises one of ``RAISED``."""

    def __init__(self, name):
        self.error = RAISED[name]

    def pack(self, codes, *, dim=1):
        raise self.error
