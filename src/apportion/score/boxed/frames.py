"""Messages over a pipe: four bytes of length, then the text."""

import os
import struct

HEADER = struct.Struct(">I")


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


def read_frame(file: int, longest: int) -> bytes:
    """Read a message from a descriptor.

    Raises:
        Broken: If the pipe ends, or the message is longer than `longest` bytes.
    """
    (length,) = HEADER.unpack(_read(file, HEADER.size))
    if length > longest:
        raise Broken(f"a message of {length} bytes; {longest} is the most")
    return _read(file, length)


def _read(file: int, length: int) -> bytes:
    """Read so many bytes."""
    parts = bytearray()
    while len(parts) < length:
        part = os.read(file, min(length - len(parts), 2**16))
        if not part:
            raise Broken("the pipe ended")
        parts += part
    return bytes(parts)
