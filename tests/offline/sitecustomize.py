"""Python runs this at its start, so every process of the tests has no network but its own machine."""

import socket


def local_only(connect):
    def wrapped(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"the tests run with the network off: {address}")
        return connect(self, address)

    return wrapped


socket.socket.connect = local_only(socket.socket.connect)
socket.socket.connect_ex = local_only(socket.socket.connect_ex)
