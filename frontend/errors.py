"""What goes wrong, in the words and the shape that OpenAI's clients know."""

from __future__ import annotations

from protocol.messages import Failed


class ApiError(Exception):
    """An error for the client: an HTTP status and the body `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(self, status: int, message: str, param: str = "", code: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of error."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, object]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param or None, "code": self.code or None}}


_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


def from_failed(failed: Failed) -> ApiError:
    """The error of a request that the scheduler ended."""
    status = failed.status if 400 <= failed.status < 600 else 500
    return ApiError(status, failed.reason, failed.param, failed.code, failed.retry_after)
