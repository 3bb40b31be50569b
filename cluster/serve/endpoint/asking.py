"""Which images does a request ask for? Its body is one, or a form with several, or, where allowed, JSON with a URL."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.receiving import RefusedError

Named = tuple[str, bytes]
"""(what to call it in the answer, an encoded file)."""
Fetch = Callable[[str], Awaitable[bytes]]
"""(URL) -> its file. Raises RefusedError."""

FIELD = "images"
_MOST_NAME = 255


async def asked(request: Request, limits: Limits, fetch: Fetch | None) -> list[Named]:
    """The images of a request; none is larger than it may be. Raises RefusedError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _of_form(request, limits)
    if kind == "application/json":
        return [await _of_url(request, fetch)]
    data = await request.body()
    if not data:
        raise RefusedError(422, f"the body is empty: send an image's bytes, or a form whose field {FIELD} holds files")
    check_image(data, limits)
    return [("image", data)]


def check_image(data: bytes, limits: Limits) -> None:
    """Raises RefusedError."""
    if len(data) > limits.image_bytes:
        raise RefusedError(413, f"an image has more than {limits.image_bytes:,} bytes: send a smaller one")


async def _of_form(request: Request, limits: Limits) -> list[Named]:
    async with request.form(max_files=limits.images, max_fields=limits.images) as form:
        files = form.getlist(FIELD)
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise RefusedError(422, f"the form's field {FIELD} holds no files: send one for each image, with a name")
        named = []
        for number, file in enumerate(files):
            data = await file.read()
            check_image(data, limits)
            named.append(((file.filename or f"image {number}")[:_MOST_NAME], data))
        return named


async def _of_url(request: Request, fetch: Fetch | None) -> Named:
    if fetch is None:
        raise RefusedError(415, "URLs are not fetched here: send the image's bytes (serve --allow-urls HOST allows it)")
    try:
        told: Any = await request.json()
        url = told["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        url = None
    if not isinstance(url, str):
        raise RefusedError(422, 'the JSON is not {"url": "https://..."}: nothing is fetched; send that')
    return url, await fetch(url)
