"""An HTTP proxy for tests, which does nothing but CONNECT, and knows every name as this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Tunnels:
    """Where the proxy listens, and what it was asked for.

    Attributes:
        status: What it answers in place of a tunnel, e.g. "403 Forbidden".
        word: The `Proxy-Authorization` that it wants.
    """

    def __init__(self, port: int) -> None:
        self.port, self.asked = port, list[str]()
        self.status, self.word = "", ""

    def serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (part := near.recv(4000)):
            head += part
        first, *headers = head.decode().split("\r\n")
        if first:  # else somebody only looked whether it is there
            self.asked.append(first.rpartition(" ")[0])
        if self.word and f"Proxy-Authorization: {self.word}".lower() not in map(str.lower, headers):
            near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        elif self.status or not first.startswith("CONNECT "):
            near.sendall(f"HTTP/1.1 {self.status or '405 No'}\r\n\r\n".encode())
        else:
            host, _, port = first.split()[1].rpartition(":")
            host = "127.0.0.1" if host.endswith(".org") else host
            with socket.create_connection((host, int(port))) as far:
                near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=pump, args=(far, near), daemon=True)
                back.start()
                pump(near, far)
                back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def tunnelling() -> Iterator[Tunnels]:
    """The proxy, on a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tunnels = Tunnels(listener.getsockname()[1])

        def one(near: socket.socket) -> None:
            with near, contextlib.suppress(OSError):
                tunnels.serve(near)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield tunnels
        listener.shutdown(socket.SHUT_RDWR)
