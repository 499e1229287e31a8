"""The ranks of a job under torchrun, and the store in which they share one queue.

A rank is one of the processes that torchrun starts. Its store is a small server for keys and values. Ranks exchange
nothing else, and no operation waits for all of them, so a rank that dies or is slow stops no other one while it draws.

    ranks = connect(wait=1800)
    ranks.agree("settings", mine, decide)      # the same decision for all, before the work
    while (number := ranks.take()) < count:    # the next piece of work that nobody has
        ...
        ranks.finish(pictures)

Without torchrun there is one rank, and a dict is its store.

Training (training.py) uses the store to begin. Its ranks then form a process group.

After a failure, torchrun (with --max-restarts) starts all ranks again, but its store still has what they left there. So
rank 0 begins the names of all keys with a random number. Every other rank chooses a second one, writes it under
hello/RANK, and finds the number of rank 0 under welcome/ITS NUMBER.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from scripts.support.flags import with_flags

if TYPE_CHECKING:
    import torch

WAIT = 1800  # seconds, as in torch.distributed
PAUSE = 0.05  # seconds between two looks at the store
LAST_WAIT = 10  # seconds that rank 0 waits for the others to leave: it may be the one that hosts the store


class Refused(Exception):
    """The ranks decided not to begin. Rank 0 has printed the reason."""


class DictStore:
    """What `Ranks` uses of a `torch.distributed.Store`, for a single process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        count = int(self.values.get(key, 0)) + amount
        self.values[key] = str(count).encode()
        return count

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]


class Ranks:
    """One rank's view of the job: its number, from 0, how many there are, and the store that they share.

    `wait` is the time limit, in seconds, of everything that waits for another rank. `say` prints a line. All methods
    raise ConnectionError, in one sentence, if the store is gone.
    """

    def __init__(self, store, rank: int, count: int, wait: float, say: Callable[[str], None]):
        self.store, self.rank, self.count, self.wait, self.say = store, rank, count, wait, say
        self.number = secrets.token_hex(8)
        self.start = self.number if rank == 0 else ""  # how the names of all keys of this start begin
        self.welcomed: set[str] = set()

    def agree(self, name: str, mine: dict, decide: Callable[[Sequence[dict]], str | None]) -> None:
        """Returns once all ranks have given their dict for JSON, and `decide`, which runs on rank 0 with all of them,
        returned None. Otherwise it returns a sentence. Then rank 0 prints that, and every rank raises Refused.

        Raises TimeoutError if a rank does not come.
        """
        if not self.start:
            self._put(f"hello/{self.rank}", self.number)
            self.start = self._get(f"welcome/{self.number}", 0)
        self._put(self._key(name, self.rank), json.dumps(mine))
        if self.rank == 0:
            try:
                said = [json.loads(self._get(self._key(name, rank), rank)) for rank in range(self.count)]
                reason = decide(said)
            except (ValueError, OSError) as error:
                reason = str(error)
            if reason:
                self.say(reason)  # before any rank exits: torchrun then stops the others
            self._put(self._key(name, "decision"), reason or "")
        if self._get(self._key(name, "decision"), 0):
            self.leave()
            raise Refused

    def take(self) -> int:
        """The number, from 0, of the next piece of work. No two ranks get the same."""
        return self._add(self._key("next"), 1) - 1

    def finish(self, count: int) -> int:
        """Counts pictures as finished, and returns how many are, in the whole job."""
        return self._add(self._key("finished"), count)

    def wait_for(self, total: int, watch: Callable[[int], None]) -> None:
        """Waits until `total` pictures are finished, and calls `watch` with their number. Raises TimeoutError if their
        number does not change for `wait` seconds."""
        seen, since = -1, time.monotonic()
        while seen < total:
            if (now := self.finish(0)) != seen:
                seen, since = now, time.monotonic()
                watch(seen)
            elif time.monotonic() - since > self.wait:
                raise TimeoutError(
                    f"{total - seen} pictures are missing, and no rank finished one for {self.wait:g} s (--wait): run "
                    "the same command again to make them."
                )
            else:
                time.sleep(PAUSE)

    def fails_first(self) -> bool:
        """Whether no other rank has called this: of several ranks that fail, one should say why."""
        try:
            return self._add(self._key("failed"), 1) == 1
        except ConnectionError:  # perhaps because another rank failed
            return True

    def leave(self) -> None:
        """Says that this rank needs the store no longer. Rank 0 waits a little for the others to say so."""
        limit = time.monotonic() + min(self.wait, LAST_WAIT)
        left = self._add(self._key("left"), 1)
        while self.rank == 0 and left < self.count and time.monotonic() < limit:
            time.sleep(PAUSE)
            left = self._add(self._key("left"), 0)

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self.start, *parts)))

    def _put(self, key: str, text: str) -> None:
        with _store_errors():
            self.store.set(key, text)
        self._add(f"{key}/there", 1)

    def _get(self, key: str, rank: int) -> str:
        """The value that `rank` puts. It looks again and again: waiting inside the store would delay Ctrl-C."""
        wait = self.wait if self.rank == 0 else 2 * self.wait  # rank 0 may itself wait for another one
        limit = time.monotonic() + wait
        while not self._add(f"{key}/there", 0):
            if time.monotonic() > limit:
                raise TimeoutError(f"rank {rank} did not come within {wait:g} s (--wait): see what stopped it.")
            if self.rank == 0:
                self._welcome()
            time.sleep(PAUSE)
        with _store_errors():
            return self.store.get(key).decode()

    def _welcome(self) -> None:
        """Answers the ranks that have said hello, and perhaps some of an earlier start, which nobody reads."""
        for rank in range(1, self.count):
            if self._add(f"hello/{rank}/there", 0):
                with _store_errors():
                    number = self.store.get(f"hello/{rank}").decode()
                if number not in self.welcomed:
                    self.welcomed.add(number)
                    self._put(f"welcome/{number}", self.start)

    def _add(self, key: str, amount: int) -> int:
        with _store_errors():
            return self.store.add(key, amount)


@contextmanager
def _store_errors():
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError and others
        raise ConnectionError(f"the store of torchrun cannot be reached ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(".")


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def connect(wait: float, say: Callable[[str], None]) -> Ranks:
    """The ranks that torchrun started, by its environment variables, or else this process alone.

    Raises ConnectionError or ValueError, in one sentence, if there is no store where the variables say, and
    TimeoutError if a rank does not come.
    """
    if not launched():
        return Ranks(DictStore(), 0, 1, wait, say)
    from torch import distributed

    if not distributed.is_available():
        raise ValueError("torchrun needs a build of torch with torch.distributed, and this one has none.")
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=wait)))
    except (RuntimeError, ValueError) as error:  # a port that is taken, a host that does not answer, no variable
        if "clients joined" in str(error):
            raise TimeoutError(f"not all ranks came within {wait:g} s (--wait): see what stopped the others.") from None
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"the store of torchrun at {where} cannot be reached ({_first_line(error)}): choose a free port with "
            "torchrun's --rdzv-endpoint or --master-port."
        ) from None
    return Ranks(store, rank, count, wait, say)


def own_device(name: str | None) -> torch.device:
    """The device called `name`, or the best one. Each rank on a machine takes a different GPU. Raises ValueError if it
    does not exist."""
    import torch

    from sd.runtime.devices import best_device

    if name in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"torchrun's --nproc-per-node should be at most {count} here, a rank for each GPU.")
        return torch.device("cuda", local)
    try:
        return best_device(name)
    except ValueError as error:
        raise ValueError(with_flags(str(error))) from None


def find_problem(said: list[dict]) -> str | None:
    """What is wrong on the first rank where something is, or an argument on which two ranks disagree. None if all is
    well."""
    from scripts.support.manifest import find_difference

    for rank, one in enumerate(said):
        if one["problem"]:
            same = all(other["problem"] == one["problem"] for other in said)
            return one["problem"] if same else f"rank {rank}: {one['problem']}"
        if difference := find_difference(said[0].get("arguments", {}), one.get("arguments", {})):
            flag, first, other = difference
            return f"all ranks should have the same arguments: {flag} is {first} on rank 0 and {other} on rank {rank}."
    return None
