"""The process that has the model. It reads JSON from standard input and writes JSON to standard output, line by line.

In:  {"draw": ID, "work": {...}}     a picture to draw, one after the other
     {"stop": ID, "how": "drop"}     or "finish": at the next step
     {"ask": N, "what": "tokens", ...}   answered at once, while a picture is being drawn
Out: {"event": "ready", ...}; {"id": ID, "event": "step", "data": {...}}; {"reply": N, "data": ...}, or "error"

It ends when standard input does, so it never outlives the server.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

KNOWN_ERRORS = (ValueError, OSError, MemoryError, ImportError)  # whose messages are sentences for users


class Worker:
    def __init__(self, out):
        self.out, self.lock = out, threading.Lock()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.stops: dict[str, str] = {}

    def send(self, message: dict) -> None:
        line = json.dumps(message, allow_nan=False).encode() + b"\n"
        with self.lock:
            self.out.write(line)
            self.out.flush()

    def listen(self, lines) -> None:
        """Reads messages until the server is gone. Runs in a thread beside `work`."""
        for line in lines:
            message = json.loads(line)
            if "draw" in message:
                self.jobs.put(message)
            elif "stop" in message:
                self.stops[message["stop"]] = message["how"]
            else:
                self.answer(message)
        os._exit(0)

    def answer(self, message: dict) -> None:
        from scripts.playground.questions import QUESTIONS

        try:
            reply = {"data": QUESTIONS[message["what"]](self.studio, message)}
        except KNOWN_ERRORS as error:
            reply = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"This could not be answered ({type(error).__name__})."}
        self.send({"reply": message["ask"], **reply})

    def work(self) -> None:
        """Draws one picture after the other."""
        while True:
            message = self.jobs.get()
            job = message["draw"]
            self.draw(job, message["work"])
            self.stops.pop(job, None)

    def draw(self, job: str, work: dict) -> None:
        from scripts.playground.drawing import Stopped

        def emit(event: str, data: dict) -> None:
            self.send({"id": job, "event": event, "data": data})

        try:
            if self.stops.get(job) == "drop":
                raise Stopped
            self.studio.draw(work, emit, lambda: self.stops.get(job))
        except Stopped:
            emit("cancelled", {})
        except KNOWN_ERRORS as error:
            emit("failed", {"sentence": str(error)})
        except Exception as error:  # one picture that fails harms no other
            traceback.print_exc()
            emit("failed", {"sentence": f"This picture could not be drawn ({type(error).__name__}: {error})."})


def load(settings: dict):
    """The `Studio` for the settings of playground.py, and what `ready` says about it."""
    import torch

    from scripts.playground.drawing import Studio, hear_warnings
    from scripts.playground.limits import Limits
    from scripts.playground.questions import about
    from scripts.support.captions import DTYPES
    from sd.adapters.tiny_autoencoder import load_tiny_autoencoder
    from sd.model_loader import load_models

    checkpoint, vae, preview = (settings[name] and Path(settings[name]) for name in ("checkpoint", "vae", "preview"))
    dtype = getattr(torch, DTYPES[settings["dtype"]]) if settings["dtype"] else None
    models = load_models(checkpoint, settings["device"], dtype, vae=vae)
    options = argparse.Namespace(checkpoint=checkpoint, vae=vae, preview=preview)
    decoder = preview and load_tiny_autoencoder(preview, models.device, argument="--preview")["decoder"]
    hear_warnings()
    studio = Studio(models, options, Limits(**settings["limits"]), decoder)
    return studio, about(studio)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes standard input
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    worker = Worker(out)
    try:
        worker.studio, about = load(json.loads(sys.argv[1]))
    except KNOWN_ERRORS as error:
        worker.send({"event": "unusable", "data": {"sentence": str(error)}})
        return 2
    worker.send({"event": "ready", "data": about})
    threading.Thread(target=worker.listen, args=(sys.stdin.buffer,), daemon=True).start()
    worker.work()
    return 0


if __name__ == "__main__":
    sys.exit(main())
