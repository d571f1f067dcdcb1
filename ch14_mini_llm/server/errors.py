"""What a client is told when something is wrong, in the shape that OpenAI's API has for it."""

from __future__ import annotations

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # others by the first digit


class ApiError(Exception):
    """An answer that is an error. status: HTTP's. param: the field that is wrong, such as "top_p". code: a word for
    programs. retry_after: seconds after which it is worth to try again, or None."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after=None
    ) -> None:
        super().__init__(_clean(message))
        self.status, self.param, self.code, self.retry_after = status, param and _clean(param), code, retry_after

    @property
    def body(self) -> dict:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers besides those of any JSON."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def _clean(text: str) -> str:
    """A text that has a UTF-8 form: what is said of a request may quote half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field that cannot be honoured."""
    return ApiError(400, message, param, code or "invalid_value")
