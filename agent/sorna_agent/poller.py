"""Which of many ZeroMQ sockets have something: a plain loop at a cost that does not grow with those
that have nothing (`zmq_poll` asks every socket every time).

A socket's descriptor tells only that something may have changed, and tells it once; sending uses
that up. So whoever sends on a watched socket says `look_again`. Used by `relay`.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from dataclasses import dataclass

import zmq

Socket = zmq.Socket[bytes]
Handler = Callable[[Socket], bool | None]
"""Takes what is there, to the end; or returns True: there may be more."""


@dataclass(slots=True)
class _Watched:
    socket: Socket
    handler: Handler
    events: int


class Poller:
    """For one thread. A handler may watch, unwatch and close any socket."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, _Watched] = {}
        self._descriptors: dict[Socket, int] = {}
        self._suspects: set[int] = set()

    def watch(self, socket: Socket, handler: Handler, events: int = zmq.POLLIN) -> None:
        """Call `handler` when the socket has `events`; replaces what was said of it before."""
        descriptor = self._descriptors.get(socket)
        if descriptor is None:
            descriptor = self._descriptors[socket] = int(socket.getsockopt(zmq.FD))
            self._epoll.register(descriptor, select.EPOLLIN)
        # As plain numbers: an enum's & costs as much as the question itself.
        self._watched[descriptor] = _Watched(socket, handler, int(events))
        self._suspects.add(descriptor)

    def unwatch(self, socket: Socket) -> None:
        """Before it is closed. Safe to repeat."""
        descriptor = self._descriptors.pop(socket, None)
        if descriptor is not None:
            self._epoll.unregister(descriptor)
            del self._watched[descriptor]
            self._suspects.discard(descriptor)

    def rest(self, socket: Socket) -> None:
        """Do not look at a watched socket until `wake`; what comes meanwhile wakes nobody."""
        descriptor = self._descriptors[socket]
        self._epoll.modify(descriptor, 0)
        self._suspects.discard(descriptor)

    def wake(self, socket: Socket) -> None:
        descriptor = self._descriptors[socket]
        self._epoll.modify(descriptor, select.EPOLLIN)
        self._suspects.add(descriptor)

    def look_again(self, socket: Socket) -> None:
        descriptor = self._descriptors.get(socket)
        if descriptor is not None:
            self._suspects.add(descriptor)

    def run_once(self, timeout: float) -> None:
        """Wait for `timeout` seconds at most, and handle what is there."""
        found = self._epoll.poll(0 if self._suspects else timeout)
        suspects, self._suspects = self._suspects, set()
        suspects.update(descriptor for descriptor, _ in found)
        for descriptor in suspects:
            watched = self._watched.get(descriptor)
            if watched is None:
                continue  # a handler before has closed it
            if int(watched.socket.getsockopt(zmq.EVENTS)) & watched.events and watched.handler(
                watched.socket
            ):
                self._suspects.add(descriptor)

    def close(self) -> None:
        self._epoll.close()
