"Programs and kernels in processes of their own, made by a server that has imported torch and its like once: starting each afresh would cost more than most of what they do."
import atexit
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Listener, wait
from pathlib import Path

PRELOADED = ["torch._dynamo", "torchdiffeq", "scipy.optimize", "sklearn.datasets", "matplotlib.pyplot", "ipykernel.kernelapp", "nbdev.test", "nbgrader.apps"]       # nothing of soflow_edu: a program imports that itself
os.environ.setdefault("OMP_NUM_THREADS", "1")       # read when torch is imported, so before the server starts
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def child(start, program, words, cwd, environment, out, err):
    for stream, path in ((1, out), (2, err)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *words]
    start(program, run_name="__main__")


def run(program, *words, cwd=".", timeout=900, **environment):
    "What `subprocess.run` returns for a console script of this environment, which finds kernels that are warm too. Raises TimeoutExpired as that does."
    program, words = str(Path(sys.executable).with_name(program)), [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
        process = context.Process(target=child, args=(runpy.run_path, program, words, str(cwd), os.environ | {"JUPYTER_PATH": kernels()} | environment, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        said = []
        for path in (out, err):
            with open(path, encoding="utf-8") as file: said.append(file.read())
        return subprocess.CompletedProcess(words, process.exitcode, *said)


# Jupyter starts a kernel by itself, so it is given a small program that asks this process for one, hands signals on to it, and dies with it.
STAND_IN = """
import os, signal, sys
from multiprocessing.connection import Client
line = Client(sys.argv[1])
line.send((sys.argv[2:], os.getcwd(), dict(os.environ)))
kernel = line.recv()
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, frame: os.kill(kernel, number))
code = line.recv()
os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
"""


def attend(line):
    "Starts the kernel that is asked for, and ends it when its stand-in ends."
    words, cwd, environment = line.recv()
    environment.pop("JPY_PARENT_PID", None)       # a kernel looks whether its parent lives, and this one's is another
    process = context.Process(target=child, args=(runpy.run_module, "ipykernel_launcher", words, cwd, environment, os.devnull, os.devnull), daemon=True)
    process.start()
    line.send(process.pid)
    if process.sentinel not in wait([line, process.sentinel]): process.kill()
    process.join()
    with suppress(OSError): line.send(process.exitcode)       # unless the stand-in has ended


@cache
def kernels():
    "A path for Jupyter on which `python3` is a kernel of the server's, while this process lives."
    listener, folder = Listener(), tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    def serve():
        while True: threading.Thread(target=attend, args=(listener.accept(),), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()
    spec = Path(folder) / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [sys.executable, "-S", "-c", STAND_IN, listener.address, "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    return folder
