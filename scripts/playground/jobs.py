"""Pictures that were asked for: their events, the queue with a fair order between clients, and what is kept of them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Iterator

OVER = ("done", "failed", "cancelled")
RECORDED = ("attention", "features")
EMPTY = 4_000  # bytes of a job without events


class Job:
    """One picture. Its events are kept, so that whoever comes late or reconnects gets all of them."""

    def __init__(self, work: dict, client: str, call: object = None):
        """`client` is whose turn in the queue it takes, `call` the call of /sdapi that it belongs to."""
        self.id = secrets.token_urlsafe(12)
        self.work, self.client, self.call = work, client, call
        self.state = "queued"  # then "running", and one of OVER
        self.position = 0  # in the queue, from 1
        self.events: list[tuple[str, str]] = []  # names and JSON
        self.size = EMPTY  # bytes, with the events and what was recorded
        self.result: dict = {}  # the data of the event that ended it
        self.recorded: dict = {}  # what is asked for by itself: RECORDED
        self.watchers = 0
        self.begun = self.step = self.steps = 0
        self.preview: str | None = None  # the latest predicted picture
        self._changed = asyncio.Event()

    @property
    def over(self) -> bool:
        return self.state in OVER

    def emit(self, event: str, data: dict) -> None:
        """Keeps an event. Nothing follows after one of OVER."""
        if self.over:
            return
        self.state = event if event in OVER else "running"
        if event == "started":
            self.begun = self.begun or time.monotonic()
            self.steps = data["steps"]
        if event == "step":
            self.step = data["index"] + 1
            self.preview = data.get("images", {}).get("denoised")
        if event == "predicted":
            self.preview = data["image"]
        if self.over:
            self.recorded = {name: data.pop(name) for name in RECORDED if name in data}
            self.result = data
            self.work, self.preview = {}, None
            self.size += len(json.dumps(self.recorded))
        text = json.dumps(data, allow_nan=False)
        self.events.append((event, text))
        self.size += len(text)
        self.touch()

    def touch(self) -> None:
        """Wakes whoever waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self, seconds: float | None = None) -> bool:
        """Waits for the next change. Returns False if there was none in so many seconds."""
        event = self._changed
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            return False
        return True


class Queue:
    """Waiting jobs. Clients take turns: each turn is one picture."""

    def __init__(self):
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # the next client first
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def of(self, client: str) -> int:
        """How many pictures of a client wait."""
        return len(self._waiting.get(client, ()))

    def __iter__(self) -> Iterator[Job]:
        """The jobs in the order in which they will be drawn."""
        rows = [deque(jobs) for jobs in self._waiting.values()]
        while rows := [row for row in rows if row]:
            for row in rows:
                yield row.popleft()

    def put(self, job: Job) -> None:
        self._waiting.setdefault(job.client, deque()).append(job)
        self._filled.set()
        self._number()

    async def filled(self) -> None:
        """Waits until there is a job."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()

    def pop(self) -> Job:
        """The next job: its client has had its turn."""
        client, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[client] = jobs  # behind all others
        job.position = 0
        self._number()
        return job

    def remove(self, job: Job) -> None:
        jobs = self._waiting.get(job.client)
        if jobs and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]
            self._number()

    def _number(self) -> None:
        for position, job in enumerate(self, 1):
            if job.position != position:
                job.position = position
                job.touch()


class Store:
    """All jobs by their ids. Finished ones are dropped, the oldest first, beyond so many bytes."""

    def __init__(self, most: int):
        self.most, self._jobs = most, OrderedDict()

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job
        self.trim()

    def remove(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def trim(self) -> None:
        finished = [job for job in self._jobs.values() if job.over and not job.watchers]
        size = sum(job.size for job in self._jobs.values())
        for job in finished:
            if size <= self.most:
                break
            size -= job.size
            self.remove(job)
