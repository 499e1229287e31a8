"""The web process's side of the worker: gives it one picture after the other, and starts it again if it dies.

This process never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path

from scripts.playground.jobs import Job, Queue, Store
from scripts.playground.limits import Limits, Wrong

WORKER = Path(__file__).with_name("worker.py")
MAX_LINE = 1 << 28  # bytes of a message from the worker
ANSWER_SECONDS = 60
STOP_SECONDS = 60  # how long a step may take once its picture is no longer wanted
MAX_RESTARTS = 5  # without a picture in between
DIED = "The process that draws has died; it is being started again. Please ask for this picture again."


class Unavailable(Exception):
    """The worker cannot answer now. The message is a sentence."""


class Server:
    """`settings` are those of the worker: checkpoint, vae, device and dtype. `stop` is called with a sentence if the
    worker cannot be used at all."""

    def __init__(self, settings: dict, limits: Limits, stop: Callable[[str], None]):
        self.settings, self.limits, self.stop = settings, limits, stop
        self.queue, self.jobs = Queue(), Store(limits.kept)
        self.about: dict = {}  # what the worker said when it was ready
        self.state = "starting"  # or "ready", "restarting", "unusable"
        self.problem = ""
        self.started = 0  # how often the worker was started
        self.running: Job | None = None
        self._ready = asyncio.Event()
        self._numbers, self._answers = itertools.count(), {}
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> Server:
        for work in (self._keep_worker(), self._draw_all()):
            self._later(work)
        return self

    async def __aexit__(self, *_: object) -> None:
        for job in self.jobs:
            job.emit("cancelled", {})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def submit(self, job: Job) -> None:
        """Puts a checked job into the queue. Raises Unavailable if it is full."""
        if len(self.queue) >= self.limits.queue:
            raise Unavailable(f"The queue should have at most {self.limits.queue} pictures: try again later.")
        if self.queue.of(job.client) >= self.limits.queue_each:
            most = self.limits.queue_each
            raise Unavailable(f"A client should have at most {most} pictures in the queue: wait for one of them.")
        self.jobs.add(job)
        self.queue.put(job)

    def cancel(self, job: Job) -> None:
        """Drops a job. Its client is told at once; a picture that is being drawn stops after its step."""
        self.queue.remove(job)
        if job is self.running and not job.over:
            self._send({"stop": job.id, "how": "drop"})
        job.emit("cancelled", {})

    def finish(self, job: Job) -> None:
        """Ends a picture early: what has been drawn so far is the result."""
        if job is self.running:
            self._send({"stop": job.id, "how": "finish"})

    @contextlib.contextmanager
    def watching(self, job: Job) -> Iterator[None]:
        """While someone watches a job, it is wanted. Some seconds after the last one has gone, it is dropped."""
        job.watchers += 1
        try:
            yield
        finally:
            job.watchers -= 1
            self.expect_watcher(job)

    def expect_watcher(self, job: Job) -> None:
        """Drops the job unless someone watches it within the time of grace."""

        def drop() -> None:
            if not job.watchers and not job.over:
                self.cancel(job)

        asyncio.get_running_loop().call_later(self.limits.grace, drop)

    async def ask(self, what: str, **more: object) -> dict:
        """An answer of the worker. Raises Wrong with its sentence, or Unavailable."""
        await self.ready()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"ask": number, "what": what, **more})
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise Unavailable("The process that draws is too busy to answer: try again.") from None
        finally:
            self._answers.pop(number, None)

    async def ready(self) -> None:
        """Waits for the worker. Raises Unavailable if it does not come."""
        if self.state == "unusable":
            raise Unavailable(self.problem)
        try:
            await asyncio.wait_for(self._ready.wait(), ANSWER_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise Unavailable("The model is still being loaded: try again in a minute.") from None

    def _send(self, message: dict) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it died just now; `_keep_worker` will notice
                self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _later(self, work: Coroutine) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):  # a fault of this program
            self.stop(f"The server cannot go on ({type(error).__name__}: {error}).")

    async def _keep_worker(self) -> None:
        """Starts the worker whenever there is none."""
        settings = json.dumps(self.settings | {"limits": asdict(self.limits)})
        failures = 0
        while True:
            self.started += 1
            pipe = asyncio.subprocess.PIPE
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable, str(WORKER), settings, stdin=pipe, stdout=pipe, limit=MAX_LINE
            )
            drawn = await self._read(process)
            await process.wait()
            self._ready.clear()
            failures = 0 if drawn else failures + 1
            self._lose()
            if self.state == "unusable" or failures > MAX_RESTARTS:
                self._give_up()
                return
            self.state = "restarting"
            await asyncio.sleep(min(2**failures / 10, 5))

    async def _read(self, process: asyncio.subprocess.Process) -> bool:
        """Takes the messages of one worker until it ends. Returns whether it finished a picture."""
        drawn = False
        while line := await process.stdout.readline():
            message = json.loads(line)
            if "reply" in message:
                self._reply(message)
            elif "id" in message:
                job = self.running
                if job is not None and job.id == message["id"]:
                    drawn |= message["event"] == "done"
                    job.emit(message["event"], message["data"])
                    if message["event"] in ("done", "failed", "cancelled"):
                        self._finished.set()
            elif message["event"] == "ready":
                self.about, self.state = message["data"], "ready"
                self._ready.set()
                self._touch_waiting()
            else:
                self.state, self.problem = "unusable", message["data"]["sentence"]
        return drawn

    def _reply(self, message: dict) -> None:
        answer = self._answers.get(message["reply"])
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(Wrong(message["error"]))
        else:
            answer.set_result(message["data"])

    def _lose(self) -> None:
        """The worker has died: whoever waited for it is told."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(DIED))
        if self.running is not None:
            self.running.emit("failed", {"sentence": DIED})
            self._finished.set()
        self._touch_waiting()

    def _give_up(self) -> None:
        self.state = "unusable"
        self.problem = self.problem or "The process that draws dies again and again: see the server's own output."
        for job in self.queue:
            job.emit("failed", {"sentence": self.problem})
        self._ready.set()  # nobody should wait
        self.stop(self.problem)

    def _touch_waiting(self) -> None:
        for job in self.queue:
            job.touch()

    async def _draw_all(self) -> None:
        """Gives the worker one job after the other."""
        while True:
            await self.queue.filled()
            await self._ready.wait()
            if self.state == "unusable":
                return
            if not len(self.queue):  # cancelled in the meantime
                continue
            job = self.queue.pop()
            self.running, self._finished, job.state = job, asyncio.Event(), "running"
            job.begun = time.monotonic()
            self._send({"draw": job.id, "work": job.work})
            await self._wait_for(job)
            self.running = None
            self.jobs.trim()

    async def _wait_for(self, job: Job) -> None:
        """Waits until the worker is done with a job, and ends one that takes too long."""
        if await self._finishes(self.limits.seconds):
            return
        most = f"at most {self.limits.seconds:g} seconds, the limit of this server"
        job.emit("failed", {"sentence": f"A picture should take {most}: ask for fewer steps or pixels."})
        self._send({"stop": job.id, "how": "drop"})
        if not await self._finishes(STOP_SECONDS):
            self._process.kill()
            await self._finished.wait()

    async def _finishes(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._finished.wait(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return False
        return True
