"""What the server reads of the settings. No FastAPI here: --help must be fast."""

from typing import Any, Protocol

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


class ServingOptions(Protocol):
    """The settings that the app reads (serve.ServeConfig)."""

    api_key: str  # "": none is needed
    max_body_bytes: int
    max_queue: int  # requests that may wait for a slot
    max_new_tokens: int
    request_timeout: float  # seconds

    def sampling(self) -> dict[str, Any]: ...
