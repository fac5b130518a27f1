"""`python ...` as a fork of this process, which has torch imported: it starts in a hundredth of the time."""

import atexit
import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback

import torch
from tqdm import tqdm


class Popen(subprocess.Popen):
    """subprocess.Popen of [python, file, ...] or [python, "-c", code, ...]: `prepare` is called in the child."""

    prepare = staticmethod(lambda: None)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, *_):  # fmt: skip
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for source, target in ((c2pwrite, 1), (errwrite, 2)):
                    if source >= 0:
                        os.dup2(source, target)
                for number in {c2pread, c2pwrite, errread, errwrite} - {-1, 1, 2}:
                    os.close(number)
                self.run([str(word) for word in args[1:] if word != "-u"], cwd, env, start_new_session)
            finally:
                os._exit(1)
        self._child_created = True
        for number in {p2cread, c2pwrite, errwrite} - {-1}:
            os.close(number)

    def run(self, words, cwd, env, start_new_session):
        gc.freeze()
        tqdm.set_lock(threading.RLock())
        torch.set_num_threads(1)
        if start_new_session:
            os.setsid()
        os.chdir(cwd or ".")
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, buffering=1)
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1)
        code = 0
        atexit._clear()  # what the parent does at its end
        try:
            self.prepare()
            if words[0] == "-c":
                sys.argv = ["-c", *words[2:]]
                exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
            else:
                sys.argv = words
                sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            code = 1
            try:
                sys.excepthook(*sys.exc_info())  # the script's own
            except BaseException:
                traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
