"""A Google Cloud Storage that runs in this process (gcp-storage-emulator), with faults on request.

The emulator does not know conditions on generations; the one that is used, `ifGenerationMatch=0`, is added here.
"""

import http.server
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import pytest
from gcp_storage_emulator import server, storage
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"


class _Server(http.server.HTTPServer):
    request_queue_size = 128  # connections of all threads at once: one that finds no place is tried again after seconds


class GoogleStore:
    """The running emulator; `plan` says what goes wrong next."""

    def __init__(self) -> None:
        self._planned: list[tuple[str, str, Callable[[Any], None]]] = []
        self.requests: list[tuple[str, str]] = []

    def plan(self, method: str, part: str, fault: int | Callable[[Any], None], times: int = 1) -> None:
        """The next requests of a method whose URL has a part are answered by a status, or by what a function sends."""
        act = (lambda handler, status=fault: _answer(handler, status)) if isinstance(fault, int) else fault
        self._planned += [(method, part, act)] * times

    def forget_plans(self) -> None:
        self._planned.clear()

    def meet(self, method: str, handler: Any) -> bool:
        """Whether a planned fault has answered."""
        self.requests.append((method, handler.path))
        for index, (wanted, part, act) in enumerate(self._planned):
            if wanted == method and part in handler.path:
                del self._planned[index]
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                act(handler)
                return True
        return False


def stop_the_clock(patch: pytest.MonkeyPatch) -> list[float]:
    """Let pauses between attempts pass at once, and nothing else take time; the list has their lengths."""
    from t5pegasus.storage import attempts

    pauses: list[float] = []
    patch.setattr(attempts, "sleep", pauses.append)
    patch.setattr(attempts, "monotonic", lambda: sum(pauses))
    return pauses


def cut_short(handler: Any) -> None:
    """Announce a hundred bytes, send ten and hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"0123456789")


def hang_up(handler: Any) -> None:
    """Close the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def run_google_store() -> Iterator[GoogleStore]:
    """Start it on a free port and lead gcsfs there."""
    from t5pegasus.storage import google

    store = GoogleStore()
    handle, multipart = server.Router.handle, objects._multipart_upload

    def handle_or_fail(router: Any, method: str) -> None:
        if not store.meet(method, router._request_handler):
            handle(router, method)

    def upload_if_new(request: Any, response: Any, storage: Any) -> None:
        bucket, name = request.params["bucket_name"], request.data["meta"].get("name")
        there = storage.get_file_list(bucket, name)[0]
        if request.query.get("ifGenerationMatch") == ["0"] and name in [entry["name"] for entry in there]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
        multipart(request, response, storage)

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server, "HTTPServer", _Server)
        patch.setattr(server.Router, "handle", handle_or_fail)
        patch.setattr(objects, "_multipart_upload", upload_if_new)
        # It would write down all that it holds after each object; nobody reads that.
        patch.setattr(storage.Storage, "_write_config_to_file", lambda _: None)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        google.open_google_store.cache_clear()
        with server.create_server("localhost", port, in_memory=True, default_bucket=BUCKET):
            yield store
        google.open_google_store.cache_clear()


def _answer(handler: Any, status: int) -> None:
    content = b'{"error": {"code": %d, "message": "planned"}}' % status
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
