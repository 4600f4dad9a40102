"""What the pickle in a `.bin` file would cost, before torch reads it.

torch's reader runs no code of a pickle, and it has no limit: a few bytes make a bytearray of gigabytes, or a tuple of
tuples whose hash takes years because it visits every part as often as it is referred to.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.tensor_info import damaged

MAX_PICKLE = 16 << 20  # bytes: the published model's shards have 0.1 million in all
MAX_VISITS = 1 << 16  # parts of one tuple, each as often as it occurs: a tensor's arguments have about twenty
OLD_PICKLES = 5  # magic number, protocol, machine, content, order of the storages
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TO_MARK = ("TUPLE", "APPENDS", "SETITEMS")
_TAKES = {"APPEND": 1, "SETITEM": 2, "REDUCE": 2, "BUILD": 1, "NEWOBJ": 2, "BINPERSID": 1}  # from the stack
_PUSHES = ("REDUCE", "NEWOBJ", "BINPERSID")
_BYTEARRAY = (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n")


def check_zip(path: Path) -> None:
    """Raise `CheckpointError` for a zip archive that is not one of torch.save, or whose pickle is a trap."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.casefold() for entry in entries]
            if len(set(names)) < len(names):
                raise damaged(path, "two files of one name in the archive")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(
                    f"{path} is a compressed archive; torch.save stores tensors as they are: unpack it"
                )
            pickles = [entry for entry in entries if entry.filename.casefold().endswith("data.pkl")]
            if any(entry.file_size > MAX_PICKLE for entry in pickles):
                raise damaged(path, f"a pickle of over {MAX_PICKLE:,} bytes")
            for entry in pickles:
                _check(path, io.BytesIO(archive.read(entry)))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path, error) from error


def check_old_form(path: Path) -> None:
    """`check_zip` for a file of torch before 1.6: pickles, one after another, then the bytes of the tensors."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(OLD_PICKLES):
        _check(path, head)


def _check(path: Path, pickle: io.BytesIO) -> None:
    """Raise `CheckpointError` for a pickle that costs more than its length."""
    if any(name in pickle.getvalue() for name in _BYTEARRAY):
        raise CheckpointError(f"{path} holds more than tensors, a bytearray: save its state_dict as safetensors")
    try:
        _count(path, pickle)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises several for a damaged one
        raise damaged(path, error) from error


def _count(path: Path, pickle: io.BytesIO) -> None:
    """Follow the stack of a pickle, with the number of visits that hashing each value takes in its place."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES or name in _TO_MARK:
            count = _TUPLES[name] if name in _TUPLES else len(stack) - marks.pop()
            parts = [stack.pop() for _ in range(count)]
            if name in _TUPLES or name == "TUPLE":
                stack.append(1 + sum(parts))
        elif name in _TAKES:
            del stack[len(stack) - _TAKES[name] :]
            stack.extend([1] if name in _PUSHES else [])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            stack.append(1)
        if stack and stack[-1] > MAX_VISITS:
            raise CheckpointError(f"{path} holds more than tensors, a tuple of {stack[-1]:,} parts: it is a trap")
