"""Make subjects in several processes; results come in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from spinmeround_jax.startup import SIGNALS

T = TypeVar("T")


class SubjectRejected(ValueError):
    """A subject cannot be made, the others can; the message is the reason, for the reject list."""


_make: Callable[[str], Any] | None = None  # of a worker process


def _made_or_rejected(make: Callable[[str], T], name: str) -> T | SubjectRejected:
    try:
        return make(name)
    except SubjectRejected as reason:
        return reason
    except Exception as error:
        error.add_note(f"while making subject {name!r}")
        raise


def _start_worker(make: Callable[[str], Any]) -> None:
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C end at once; the parent reports it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM: a process that is half started would print a traceback.

    By handlers, since a blocked signal would be delivered to another thread.
    """
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def _make_in_worker(name: str) -> Any:
    assert _make is not None
    return _made_or_rejected(_make, name)


def made(
    make: Callable[[str], T], names: Sequence[str], workers: int
) -> Iterator[T | SubjectRejected]:
    """What `make` returns for each subject, or its rejection, in order, by `workers` processes.

    Args:
        make: picklable, such as a Source's `records`.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    if min(workers, len(names)) <= 1:
        yield from (_made_or_rejected(make, name) for name in names)
        return
    # spawn: embree and jax must not be forked once they have started threads.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(names)), multiprocessing.get_context("spawn"), _start_worker, (make,)
    )
    try:
        remaining = iter(names)
        with _signals_wait():  # they start the processes
            running = collections.deque(
                pool.submit(_make_in_worker, name)
                for name in itertools.islice(remaining, 2 * workers)
            )
        while running:
            result = running.popleft().result()
            running.extend(
                pool.submit(_make_in_worker, name) for name in itertools.islice(remaining, 1)
            )
            yield result
    except BaseException:  # an error, Ctrl-C, or a SIGTERM, which reaches this process alone
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
