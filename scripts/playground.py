"""Opens a page on which one sees the model think, and serves the interface of AUTOMATIC1111's web UI.

    python scripts/playground.py
    python scripts/playground.py --checkpoint data/v1-5-pruned-emaonly.safetensors
    python scripts/playground.py --host 0.0.0.0 --token "a long password"

Only programs on this machine can reach it, unless --host says otherwise. Press Ctrl-C to stop it.
"""

from __future__ import annotations

import argparse
import asyncio
import mimetypes
import socket
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.playground.limits import Limits
from scripts.playground.security import LOCAL
from scripts.support.captions import DTYPES
from scripts.support.checks import may_be_on_hub
from scripts.support.command_line import Parser, run

PACKAGES = ("fastapi", "uvicorn")
PATHS = ("checkpoint", "vae", "preview")  # flags; each may also be owner/name on the hub
PORT = 7860  # AUTOMATIC1111's, which its clients try first
MIN_TOKEN = 12  # characters
CLOSE_SECONDS = 3  # for streams of events that are still open
MAX_CONNECTIONS = 256


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("playground.py", __doc__)
    add = parser.add_argument
    help = "Stable Diffusion 1.x or 2.x: a file, a folder or owner/name on the hub (default: the tiny model)"
    add("--checkpoint", type=Path, metavar="PATH", help=help)
    add("--vae", type=Path, metavar="PATH", help="a VAE, or a TAESD, instead of the checkpoint's own")
    add("--preview", type=Path, metavar="PATH", help="a tiny autoencoder (TAESD) that decodes every step")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is available)")
    add("--dtype", choices=DTYPES, help="precision (default: the fastest without a visible loss)")
    add("--host", default=LOCAL[0], metavar="NAME", help="where to listen (127.0.0.1); another one needs --token")
    add("--port", type=int, default=PORT, metavar="N", help=f"where to listen ({PORT}); 0 is any that is free")
    add("--token", metavar="TEXT", help=f"what clients must send, of at least {MIN_TOKEN} characters")
    add("--no-browser", action="store_true", help="open no browser")
    for name, what in (
        ("steps", "steps of a picture"),
        ("pixels", "pixels of a picture"),
        ("queue", "pictures that wait"),
        ("seconds", "seconds that a picture may take"),
    ):
        default = getattr(Limits, name)
        kind = type(default)
        add(f"--max-{name}", type=kind, default=default, metavar="N", help=f"the most {what} ({default})")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError or ImportError for options that cannot work, before anything is started."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        remedy = "pip install -r requirements-playground.txt, or start it by `sh scripts/playground.sh`"
        raise ImportError(f"The playground needs {' and '.join(missing)}: {remedy}.")
    if options.host not in LOCAL and options.token is None:
        raise ValueError(f"--token should be given with --host {options.host}: others could use this server.")
    if options.token is not None and (len(options.token) < MIN_TOKEN or not options.token.isascii()):
        raise ValueError(f"--token should be at least {MIN_TOKEN} characters of ASCII, not {len(options.token)}.")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port should be from 0 to 65535, not {options.port}.")
    for name in ("steps", "pixels", "queue", "seconds"):
        if not getattr(options, f"max_{name}") > 0:
            raise ValueError(f"--max-{name} should be above 0, not {getattr(options, f'max_{name}')}.")
    for name in PATHS:
        path = getattr(options, name)
        if path is not None and not path.exists() and not may_be_on_hub(path):
            raise ValueError(f"--{name} should be a file or a folder: there is none at {path}.")
    if options.preview and not options.checkpoint:
        raise ValueError("--checkpoint should be given with --preview: the tiny model's own decoder is quick enough.")


def listen(host: str, port: int) -> socket.socket:
    """The socket to listen on. Raises OSError, in one sentence, if it is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--host and --port should be free: {host}:{port} is not ({error.strerror or error}).") from None


async def serve(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C. Returns the exit status."""
    import uvicorn

    from scripts.playground.app import make_app
    from scripts.playground.protocol import Protocol

    limits = Limits(options.max_steps, options.max_pixels, queue=options.max_queue, seconds=options.max_seconds)
    listening = listen(options.host, options.port)
    port = listening.getsockname()[1]
    settings = {name: getattr(options, name) for name in ("device", "dtype")}
    settings |= {name: getattr(options, name) and str(getattr(options, name)) for name in PATHS}
    problems: list[str] = []

    def stop(sentence: str) -> None:
        problems.append(sentence)
        server.should_exit = True

    mimetypes.add_type("text/javascript", ".js")  # Windows may say otherwise, and browsers then refuse modules
    app = make_app(settings, limits, options.host, port, options.token, stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            http=Protocol,
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    opening = asyncio.create_task(announce(options, server, port))
    await server.serve([listening])
    opening.cancel()
    if problems:
        raise ValueError(problems[0])
    return 0


async def announce(options: argparse.Namespace, server: object, port: int) -> None:
    """Prints the address as soon as the server answers, and opens it."""
    while not server.started:
        await asyncio.sleep(0.02)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{port}/" + (f"?token={quote(options.token, safe='')}" if options.token else "")
    print(f"The playground is at {address}", flush=True)
    if options.host in LOCAL and not options.no_browser:
        await asyncio.to_thread(webbrowser.open, address)


def work(options: argparse.Namespace) -> int:
    check(options)
    return asyncio.run(serve(options))


def main() -> int:
    options = parse()
    return run("playground.py", lambda: work(options), "stopped.")


if __name__ == "__main__":
    sys.exit(main())
