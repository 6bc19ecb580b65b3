"""GET /: a page to try the model from a browser. One file, no build step, nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from litestar import MediaType, Response, get

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The browser itself refuses whatever is not on the page or this server."""


@cache
def _page() -> bytes:
    return files("serve").joinpath("page.html").read_bytes()


@get("/", include_in_schema=False)
async def page() -> Response[bytes]:
    """Answered without a key: the page asks for one."""
    return Response(
        _page(),
        media_type=MediaType.HTML,
        headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"},
    )
