"""The errors that end a command with one sentence instead of a traceback.

Their message names the flag or file, what was found, what was expected and how to mend it.
"""

import errno
import os
import re


class UserError(Exception):
    """An error that the user can mend; its message is printed as it is."""

    exit_status = 1


class Refused(UserError):
    """Refused before any work: wrong usage, contradicting or impossible configuration (exit status 2)."""

    exit_status = 2


class Failed(UserError):
    """The work itself could not be done: a damaged file, a full disk, a dead peer (exit status 1)."""

    exit_status = 1


class PeerFailure(Exception):
    """Another rank failed and speaks for all; this one leaves silently with the status of a failure."""

    exit_status = 1

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank


def system_error(error: BaseException) -> OSError | None:
    """The system's error that this is; libraries written in Rust (tokenizers, safetensors) tell it as text alone."""
    if isinstance(error, OSError):
        return error
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def system_reason(error: OSError) -> str:
    """Why the system refused something, and the file if it is known, in the words of this program."""
    reasons = {errno.ENOSPC: "no space left on the disk", errno.EACCES: "permission denied"}
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return f"{reason}: {error.filename}" if error.filename else reason
