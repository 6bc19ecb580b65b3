"""The one exception that means "the user can fix this"; entry points turn it into exit code 2 or a 4xx."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input of a config, file, request or checkpoint.

    field: what was wrong, as the user wrote it (``model.num_heads``, ``--checkpoint``, ``num_steps``).
    value: what was given. problem: why it cannot be used. remedy: what to do instead.
    ``str(error)`` is one line: ``field=value: problem; remedy``.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field}={quoted(value)}: {problem}; {remedy}")


def quoted(value: object) -> str:
    """A value as messages show it: its first characters, where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def reason(error: BaseException) -> str:
    """What a library's exception says, as one line for a ``UserError``: its first line, or its class where it
    says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, numpy or the system had no memory left."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)
