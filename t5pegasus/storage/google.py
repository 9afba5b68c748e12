"""The connection to Google Cloud Storage."""

import functools
import logging
import os
from typing import Any

_LARGEST_REQUEST, _BOUNDARY = 50 << 20, b"--==0=="


@functools.cache
def open_google_store() -> Any:
    """A gcsfs filesystem that never answers from a cache of listings, and whose requests end.

    The JSON API alone is used (no gRPC), which any bucket answers but zonal ones. `STORAGE_EMULATOR_HOST` leads to an
    emulator, without credentials.
    """
    import aiohttp
    from gcsfs.core import GCSFileSystem

    once = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)

    class OnceFileSystem(GCSFileSystem):
        """Asks once: `attempts` decides how often and how long to ask again, and says what came of it."""

        async def _request(self, *args: Any, **options: Any) -> Any:
            return await once(self, *args, **options)

        async def _pipe_file(self, path: str, data: bytes, **options: Any) -> None:
            # In one request gcsfs puts the content between fixed boundaries, with a bare line feed behind it: together
            # with a last byte CR that is the line end which, by RFC 2046, belongs to the boundary. Such content goes
            # up as an upload of one part.
            if data.endswith(b"\r") or _BOUNDARY in data:
                options["chunksize"] = min(len(data), _LARGEST_REQUEST)
            await super()._pipe_file(path, data, **options)

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it also raises
    return OnceFileSystem(
        project=os.environ.get("GOOGLE_CLOUD_PROJECT", ""),
        token="anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None,
        use_listings_cache=False,
        consistency="md5",
        requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
        skip_instance_cache=True,
    )
