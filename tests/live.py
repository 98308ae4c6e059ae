"""A server behind a real socket, for tests."""
import socket
import threading
import time

import uvicorn

from nanochat_nb.server import GRACE


class Live:
    """An application behind a real socket; `address` is the API's."""

    def __init__(self, app):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=GRACE))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *exception):
        self.server.should_exit = True
        self.thread.join(30)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
