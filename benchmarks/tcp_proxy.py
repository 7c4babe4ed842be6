"""A TCP proxy in user space: delays, holds or cuts what passes between services, for benchmarks and fault tests.

    python benchmarks/tcp_proxy.py TARGET_PORT --delay 0.01

Each direction of each connection has a reader that stamps what it got and a writer that sends it `delay` seconds
later, so the delay adds to the latency and not to the throughput. Times are kept by sleeping threads, whose precision
(some 60 µs) an event loop's timers (1 ms) do not reach.
"""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Callable

CHUNK = 1 << 16


class Direction:
    """One way through the proxy; its fields may be changed while it runs."""

    def __init__(self, delay: float = 0.0, jitter: float = 0.0) -> None:
        self.delay = delay  # seconds
        self.jitter = jitter  # share of the delay, ± at random, in order all the same
        self.flowing = threading.Event()  # cleared: bytes are held, the connection stays open
        self.flowing.set()
        self.passed = 0  # bytes that have gone through
        self.held = 0  # bytes that arrived while it was held


class TcpProxy:
    """Listens on loopback and passes each connection on to `target`. Use as a context manager."""

    def __init__(self, target: tuple[str, int], delay: float = 0.0, jitter: float = 0.0) -> None:
        self.target = target
        self.up = Direction(delay, jitter)  # from who connects to the target
        self.down = Direction(delay, jitter)
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and stop listening."""
        self._closed = True
        self._listener.close()
        self.up.flowing.set()
        self.down.flowing.set()
        self.cut()

    def cut(self) -> int:
        """Close every connection now, both halves; returns how many. New ones are accepted."""
        with self._lock:
            sockets, self._open = list(self._open), set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        return len(sockets) // 2

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, timeout=1)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            self.connections += 1
            self._pump(client, server, self.up)
            self._pump(server, client, self.down)

    def _pump(self, source: socket.socket, sink: socket.socket, way: Direction) -> None:
        waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(source, way, waiting), daemon=True).start()
        threading.Thread(target=self._write, args=(sink, way, waiting), daemon=True).start()

    def _read(self, source: socket.socket, way: Direction, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            data = b""
            with contextlib.suppress(OSError):
                data = source.recv(CHUNK)
            self._arrived(way, data)
            if not way.flowing.is_set():
                way.held += len(data)
            delay = way.delay * (1 + random.uniform(-way.jitter, way.jitter)) if way.jitter else way.delay
            waiting.put((time.monotonic() + delay, data))

    def _arrived(self, way: Direction, data: bytes) -> None:
        """Data has come in one direction, and goes on after this. For those that look closer."""

    def _write(self, sink: socket.socket, way: Direction, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        while True:
            when, data = waiting.get()
            if (wait := when - time.monotonic()) > 0:
                time.sleep(wait)
            way.flowing.wait()
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return
            way.passed += len(data)


def serve(target_port: int, delay: float, ready: Callable[[int], None]) -> None:
    """Run one proxy until the process is ended; `ready` is called with its port."""
    with TcpProxy(("127.0.0.1", target_port), delay) as proxy:
        ready(proxy.port)
        threading.Event().wait()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=int, help="port on loopback to pass connections on to")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds, each way")
    arguments = parser.parse_args()
    serve(arguments.target, arguments.delay, lambda port: print(f"listening on 127.0.0.1:{port}", flush=True))
