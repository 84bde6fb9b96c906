"""Messages over a pipe: four bytes of length, then the text."""

import os
import select
import struct

HEADER = struct.Struct(">I")
CALLER = 3
"""In a box, the descriptor that tells when the process is gone that asked for it."""


class Broken(EOFError):
    """The other end is gone, or sends what is no message."""


def write_frame(file: int, content: bytes) -> None:
    """Write a message to a descriptor."""
    view = memoryview(HEADER.pack(len(content)) + content)
    while view:
        try:
            view = view[os.write(file, view) :]
        except BrokenPipeError:
            raise Broken("the other end is gone") from None


def read_frame(file: int, longest: int, *, of_caller: bool = False) -> bytes:
    """Read a message from a descriptor; `of_caller` tells that it is of the process that asked for this box.

    Raises:
        Broken: If the pipe ends, the caller does, or the message is longer than `longest` bytes.
    """
    (length,) = HEADER.unpack(_read(file, HEADER.size, of_caller))
    if length > longest:
        raise Broken(f"a message of {length} bytes; {longest} is the most")
    return _read(file, length, of_caller)


def _read(file: int, length: int, of_caller: bool) -> bytes:
    """Read so many bytes."""
    parts = bytearray()
    while len(parts) < length:
        if of_caller and CALLER in select.select([file, CALLER], [], [])[0]:
            raise Broken("the caller is gone")
        part = os.read(file, min(length - len(parts), 2**16))
        if not part:
            raise Broken("the pipe ended")
        parts += part
    return bytes(parts)
