"""Run jobs of the scripts on N processes, as torchrun starts them, without importing torch for each job anew.

    python tests/ranks.py N jobs.json

jobs.json: a list of {"script": "dpo", "flags": {...}, "stop": 0, "kill": -1}. After the step `stop` the last rank gets
SIGTERM; after the second step the rank `kill` is killed. Each process has the environment that torchrun would give it,
and runs the jobs one after the other; the last line printed has their exit codes.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
common, *MODULES = map(importlib.import_module, ("common", "sft", "dpo", "reward_model", "ppo", "grpo"))
SCRIPTS = {module.__name__: module for module in MODULES}


def run(job, rank, is_last):
    """One job on this rank."""
    module, number = SCRIPTS[job["script"]], job.get("stop", 0)
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


def main(world, jobs):
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world),
                               "RANK": str(rank), "LOCAL_RANK": str(rank)}
            common.time = types.SimpleNamespace(time=time.time, sleep=lambda _: time.sleep(1))  # no agent ends it
            for job in jobs:
                run(job, rank, rank == world - 1)
            sys.exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"\n{codes}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
