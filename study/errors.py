"""What ends a run in one line: the user's input, and what the system has no more of."""

import errno
import os
import re
import sys


class InputError(Exception):
    """The user's input is at fault. One line names the value, what was expected and the fix."""


# What the system has no more of, by the number of its error, and what to do about it.
LIMITS = {
    errno.ENOSPC: "no space left on the disk: free some and",
    errno.EDQUOT: "the disk quota is used up: free some of it and",
    errno.EFBIG: "a file is larger than the system allows: raise the limit (ulimit -f) and",
    errno.ENOMEM: "not enough memory: give the process more, or the run a smaller batch, and",
}
# What a user may not do there, by the number of its error.
DENIALS = (errno.EACCES, errno.EPERM, errno.EROFS)
# How torch says so, which raises plain RuntimeErrors; CUDA's and Python's allocators.
NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't start new thread")


def explain(error):
    """What outside this program an exception comes from: a full disk, a quota or limit that is
    used up, a file or folder without permission, a process that ended; else None.
    """
    chain = [error]  # torch, HDF5 and Pillow raise others before or after the disk's own
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for raised in reversed(chain):
        if isinstance(raised, OSError):
            for number, reason in LIMITS.items():
                # HDF5 gives no number.
                if number == raised.errno or os.strerror(number) in str(raised):
                    return reason
            if raised.errno in DENIALS:
                named = re.search("name = '(.*?)'", str(raised))  # as HDF5 says it
                place = os.fsdecode(raised.filename or (named[1] if named else str(raised)))
                cause = os.strerror(raised.errno)
                return f"{place}: no permission ({cause}): change that, or the place, and"
    first = chain[-1]
    message = str(first)
    if isinstance(first, MemoryError) or any(words in message for words in NO_MEMORY):
        return f"{LIMITS[errno.ENOMEM].removesuffix(' and')} ({message or 'MemoryError'}) and"
    distributed = sys.modules.get("torch.distributed")  # If it is not loaded, it raised nothing.
    of_another = distributed is not None and isinstance(first, distributed.DistError)
    if of_another or "gloo/" in str(first):  # gloo's own errors are plain RuntimeErrors.
        return f"another process of this run ended ({str(first).splitlines()[0]}):"
    return None
