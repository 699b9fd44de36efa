"""The HTTP client under S3: no redirect is followed, and no answer fills the memory.

The client reads listings and errors whole before it parses them, so a server that never ends one could take
all memory; and it would follow a redirect to wherever the server says. botocore itself handles the redirects
that S3 makes between regions. Bodies of objects are streamed, and bounded where they are read.
"""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession

from hqlabel.pipeline.storage.backend import drain

MOST_ANSWER_BYTES = 64 * 2**20
"""Of a listing of 1,000 keys, or an error: far more than S3 ever sends."""

_REGION = "x-amz-bucket-region"  # S3 states it where it redirects to another region, which botocore does


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """aiobotocore's client over aiohttp, with these two rules."""

    async def _get_session(self, proxy_url: str | None) -> _Client:
        return _Client(await super()._get_session(proxy_url))


class _Client:
    def __init__(self, session: Any) -> None:
        self._session = session

    async def request(self, method: str, **named: Any) -> _Answer:
        answer = await self._session.request(method, allow_redirects=False, **named)
        if 300 < answer.status < 400 and answer.status != 304 and _REGION not in answer.headers:
            answer.release()
            raise ConnectionError(f"the endpoint redirects (HTTP {answer.status}), which is not followed")
        return _Answer(answer)


class _Answer:
    """An answer of aiohttp whose body, read as a whole, is bounded."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)

    async def read(self) -> bytes:
        """Return the whole body; OSError for one that is no answer of S3 by its length."""
        try:
            body = await drain(self._answer.content.read, MOST_ANSWER_BYTES)
        finally:
            self._answer.release()
        return body
