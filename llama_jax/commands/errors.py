"""What is said of an error, and with which code the command ends."""

import sys

FAILED, WRONG_INPUT = 1, 2

# What a user can do something about; anything else is a bug and shows a traceback. Numbers that are
# not finite come from weights or settings.
USUAL_ERRORS = (ValueError, RuntimeError, OSError, MemoryError, FloatingPointError)


def code_of(error: Exception) -> int:
    """The exit code that says what kind of error it was."""
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return WRONG_INPUT
    # Some errors bring the code that whoever started the command waits for.
    return getattr(error, "exit_code", FAILED)


def complain(command: str, error: BaseException) -> None:
    """One line on standard error."""
    one_line = " ".join(_told(error).split())
    sys.stderr.write(f"llama-jax {command}: error: {one_line}\n")


def _told(error: BaseException) -> str:
    """Without the number that the operating system gives its errors about files."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{error}" or type(error).__name__
