"""Errors of reading input: those of a file, which a run may leave out, and those of the machine, which end it."""

import errno

_OF_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def raise_if_of_machine(error: Exception, file: str) -> None:
    """Raises OSError if ``error``, or what caused it, is not ``file``'s fault.

    The disk, as of a cache, is full or read-only, too many files are open, or memory has run out.
    """
    for fault in (error, error.__cause__):
        if isinstance(fault, MemoryError):
            raise fault
        if isinstance(fault, OSError) and fault.errno in _OF_MACHINE:
            raise OSError(fault.errno, f"{fault.strerror}, as {file} was read") from error
