"""Runs a function on several ranks: processes that share a store, as under torchrun, but start in milliseconds."""

import multiprocessing
import socket
import sys

import pytest
import torch
from torch import distributed

from sd.training import ranks

CPU = torch.device("cpu")
WAIT = 60  # seconds
KILLED = "killed"

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(count, work, *arguments, wait=WAIT, meanwhile=lambda processes: None):
    """What `work(*arguments)` returned on each rank, or the error that it raised there, or KILLED. The processes are
    copies of this one. `meanwhile` is called while they run."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_one, args=(rank, count, port, wait, pipes[rank][1], work, arguments))
        for rank in range(count)
    ]
    for process, (_, sends) in zip(processes, pipes):
        process.start()
        sends.close()
    results = []
    try:
        meanwhile(processes)
        for receives, _ in pipes:
            assert receives.poll(10 * WAIT), "a rank hangs"
            try:
                results.append(receives.recv())
            except EOFError:
                results.append(KILLED)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _one(rank, count, port, wait, pipe, work, arguments):
    torch.set_num_threads(1)  # a pool of threads does not survive fork
    try:
        store = distributed.TCPStore("127.0.0.1", port, count, is_master=rank == 0, wait_for_workers=False)
        with ranks.joined(store, rank, count, CPU, wait):
            result = work(*arguments)
    except Exception as error:
        result = error
    pipe.send(result)
