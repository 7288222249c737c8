"""Hugging Face's hub, where there may be no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse
from urllib.request import getproxies


@contextmanager
def no_waiting_offline() -> Iterator[None]:
    """Where the hub's name does not resolve, only its cache is asked inside: its client would try for minutes."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves(address: str) -> bool:
    """Whether the host of an address has one; a proxy resolves names by itself."""
    place, proxies = urlparse(address), getproxies()
    # the other variables of proxies say nothing of this address
    if proxies.get(place.scheme) or proxies.get("all"):
        return True
    try:
        socket.getaddrinfo(place.hostname, None)
    except OSError:
        return False
    return True
