"""What can go wrong in a request, as exceptions that carry their HTTP answer. No litestar here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rdlm.errors import UserError


class ApiError(Exception):
    """An answer other than success, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.message, self.kind, self.param, self.code, self.retry_after = (
            status,
            message,
            kind,
            param,
            code,
            retry_after,
        )
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class QueueFull(ApiError):
    """429: more requests are waiting than the server promised to hold."""

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        message = f"the queue is full ({waiting} waiting, at most {limit}); try again in {retry_after} s"
        super().__init__(429, message, "rate_limit_error", code="queue_full", retry_after=retry_after)


class EngineClosed(ApiError):
    """503: the model is loading, or the server is on its way out."""

    def __init__(self, state: str) -> None:
        super().__init__(
            503, f"the server is {state}; try again later", "server_error", code=state, retry_after=2
        )


def shorten(text: str, length: int = 80) -> str:
    """``text`` as an error may quote it."""
    return text if len(text) <= length else f"{text[:length]}..."


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, "invalid_request_error", param, code)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors within name the fields as the client sent them: ``names`` has the other interface's name of each."""
    try:
        yield
    except ApiError as error:
        pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, names)) + r")(?![\w])")
        error.message = pattern.sub(lambda found: names[found[1]], error.message)
        error.param = error.param and pattern.sub(lambda found: names[found[1]], error.param)
        raise


def from_user_error(error: UserError) -> ApiError:
    return invalid(str(error), error.field)
