"Programs in processes of their own, made by a server that has imported torch and its like once: starting each afresh would cost more than most of what they do."
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = ["torch", "torchdiffeq", "scipy.optimize", "sklearn.datasets", "matplotlib.pyplot", "nbdev.test"]       # nothing of soflow_edu: a program imports that itself
os.environ.setdefault("OMP_NUM_THREADS", "1")       # read when torch is imported, so before the server starts
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def child(program, words, cwd, environment, out, err):
    for stream, path in ((1, out), (2, err)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")


def run(program, *words, cwd=".", timeout=900, **environment):
    "What `subprocess.run` returns for a console script of this environment. Raises TimeoutExpired as that does."
    program, words = str(Path(sys.executable).with_name(program)), [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
        process = context.Process(target=child, args=(program, words, str(cwd), os.environ | environment, out, err))
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
