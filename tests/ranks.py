"""Jobs of the scripts on N processes, as torchrun starts them: forks of this process, which has torch imported."""

import importlib
import os
import signal
import socket
import sys
import time
import types

import common
import kills

SECONDS = 600  # that N processes may take, on a machine that is busy


def run(job, rank, is_last):
    """One job on this rank: {"script": "dpo", "flags": {...}, "stop": 0, "kill": -1}. After the step `stop` the last
    rank gets SIGTERM; after the second step the rank `kill` is killed."""
    module, number = importlib.import_module(job["script"]), job.get("stop", 0)
    log = common.Run.log

    def log_and_stop(self, step, metrics, samples=()):
        log(self, step, metrics, samples)
        if is_last and step == number > 0 and "learning_rate" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)
        if rank == job.get("kill", -1) and step > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.log = log_and_stop
    try:
        module.main(module.Args(**job["flags"]))
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM or not number:
            raise
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
    finally:
        common.Run.log = log


def run_on_ranks(world, jobs, log, ends_others=False):
    """The exit codes of N processes that run the jobs one after the other; what they print goes to the file `log`."""
    def main(rank):
        if not ends_others:  # nor does any agent
            common.time = types.SimpleNamespace(time=time.time, sleep=lambda _: time.sleep(1))
        for job in jobs:
            run(job, rank, rank == world - 1)

    return on_ranks(world, main, log, ends_others)


def on_ranks(world, main, log, ends_others=False):
    """The exit codes of N processes that run main(rank) in the environment that torchrun would give them. ends_others:
    when one has ended with an error, the others are told to end, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def run_main(rank):
        if world > 1:
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world),
                           "RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            main(rank)
        except Exception:
            sys.excepthook(*sys.exc_info())  # the script's own
            raise SystemExit(1) from None

    children = []
    for rank in range(world):
        module = types.SimpleNamespace(main=lambda _, rank=rank: run_main(rank))
        children.append(kills.Child(types.SimpleNamespace(module=module), None, log))
    return wait_for_all(children, ends_others)


def wait_for_all(children, ends_others=False):
    """Their exit codes."""
    end = time.monotonic() + SECONDS
    while not all([child.ended() for child in children]) and time.monotonic() < end:
        time.sleep(0.01)
        if ends_others and any(child.code for child in children):
            for child in children:
                if not child.ended():
                    os.kill(child.pid, signal.SIGTERM)
    for child in children:
        if not child.ended():
            child.kill()
    return [child.code for child in children]
