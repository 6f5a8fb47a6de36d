"""Finding the network interface by which this machine reaches another."""

from __future__ import annotations

import socket
import struct
import sys

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux's <linux/sockios.h>: the IPv4 address of an interface."""


def interface_towards(host: str, port: int) -> str:
    """Return the name of the interface whose address this machine uses towards `host`.

    A host name that resolves to a loopback address (as Debian writes into `/etc/hosts`) would otherwise make
    processes offer each other an address that leads nowhere. Nothing is sent.

    Returns:
        The name, or an empty text where it cannot be found out: another system than Linux, IPv6, no route.
    """
    if not sys.platform.startswith("linux"):
        return ""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            address = probe.getsockname()[0]
            return next((name for _, name in socket.if_nameindex() if _address(probe, name) == address), "")
    except OSError:
        return ""


def _address(probe: socket.socket, interface: str) -> str:
    import fcntl

    try:
        answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # an interface without an IPv4 address
        return ""
    return socket.inet_ntoa(answer[20:24])
