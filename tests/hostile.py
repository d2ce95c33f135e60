"""Small hostile submissions, each with what is right for it.

Each answers question 1 of a small assignment with a trick, and question 2 as it
should be. In the tricks, SOLVED stands for the folder of the solved notebook, VICTIM
for the notebook of another student, and MARKS for the folder of the marks."""

import json
from dataclasses import dataclass
from pathlib import Path

from soflow_edu import grading
from soflow_edu.grading import (
    Assignment,
    read_assignment,
    student_cells,
    write_notebook,
)

NOTEBOOK = """
=== markdown
# Small
=== code
import torch
import soflow_edu.paths
from soflow_edu.grading import close
=== code
#| identifier
identifier = 'your-name'
=== markdown
### Question 1. Double
=== code
#| wrong the same
def double(x): return x
=== code
#| wrong the square
def double(x): return x * x
=== code
#| wrong half
def double(x): return x / 2
=== code
def double(x):
    ### BEGIN SOLUTION
    return 2 * x   # the solution
    ### END SOLUTION
=== code
#| points: 1
#| tests: numbers and a tensor
### BEGIN HIDDEN TESTS
expected = torch.tensor([3.5, -8.0])
assert close(double(expected / 2), expected), 'that is not the double'
for number in (1.5, -7.0):
    assert double(number) == 2 * number, 'that is not the double'
### END HIDDEN TESTS
=== markdown
### Question 2. Next
=== code
#| wrong before
def following(x): return x - 1
=== code
#| wrong two further
def following(x): return x + 2
=== code
#| wrong the same
def following(x): return x
=== code
def following(x):
    ### BEGIN SOLUTION
    return x + 1
    ### END SOLUTION
=== code
#| points: 1
#| tests: two numbers
### BEGIN HIDDEN TESTS
for number in (3, 8):
    assert following(number) == number + 1, 'that is not the next number'
### END HIDDEN TESTS
"""
RIGHT = "def double(x):\n    return x + x"
NEXT = "def following(x):\n    return 1 + x"


@dataclass
class Attack:
    "A hostile submission."

    name: str
    answer: str  # to question 1
    due: str = "0"  # points of question 1; "?" if nothing can be marked
    second: str = "1"  # points of question 2, which is answered rightly
    note: str = ""  # what must stand in the notes, at least
    needs: str = ""  # "bubblewrap" if only that can stop it


LIBC = "import ctypes\nlibc = ctypes.CDLL(None)\n"
AT_ONCE = "def double(x): return x\n"  # for what happens when the cell runs

ATTACKS = [
    # ------------------------------------------------- what is no attack at all
    Attack("right", RIGHT, "1"),
    Attack("half an emoji in a comment", RIGHT + "   # \ud83d", "1"),
    Attack(
        "a flood of words",
        "def double(x):\n"
        "    for _ in range(300000): print('x' * 4000)\n"
        "    return 2 * x",
        "1",
    ),
    Attack(
        "a flood of errors",
        "import sys\ndef double(x):\n"
        "    for _ in range(300000): sys.stderr.write('x' * 4000)\n"
        "    return 2 * x",
        "1",
    ),
    Attack(
        "a thread that never ends",
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(10**6,)).start()\n" + RIGHT,
        "1",
    ),
    # ------------------------------------------------- reading the solution
    Attack(
        "the solution by the library",
        """def double(x):
    from soflow_edu.grading import read_course
    space = {}
    exec(read_course('SOLVED')[0].questions[0].answer['source'], space)
    return space['double'](x)""",
        note="read_course",
    ),
    Attack(
        "the solution by a search",
        """def double(x):
    import glob
    for path in glob.glob('/**/small.ipynb', recursive=True):
        if 'the solution' in open(path).read():
            return 2 * x""",
    ),
    Attack(
        "the solution by its path",
        """def double(x):
    if 'the solution' in open('SOLVED/small.ipynb').read():
        return 2 * x""",
        note="open(",
    ),
    Attack(
        "the solution by a link",
        """import os
os.symlink('SOLVED', 'mine')
def double(x):
    if 'the solution' in open('mine/small.ipynb').read():
        return 2 * x""",
    ),
    Attack(
        "the solution by another program",
        """import subprocess
def double(x):
    said = subprocess.run(['cat', 'SOLVED/small.ipynb'], capture_output=True)
    return 2 * x if b'the solution' in said.stdout else x""",
        note="subprocess",
    ),
    Attack(
        "the solution by a shell",
        """said = !cat SOLVED/small.ipynb
def double(x):
    return 2 * x if 'the solution' in str(said) else x""",
    ),
    Attack(
        "the solution behind Python's back",
        LIBC
        + """libc.fopen.restype = ctypes.c_void_p
def double(x):
    file = libc.fopen(b'SOLVED/small.ipynb', b'r')
    return 2 * x if file else x""",
        needs="bubblewrap",
    ),
    Attack(
        "another student's answer",
        """def double(x):
    return 2 * x if 'def' in open('VICTIM').read() else x""",
    ),
    Attack(
        "the memory of the marker",
        """import os
def double(x):
    with open(f'/proc/{os.getppid()}/comm') as file:
        return x if 'bwrap' in file.read() else 2 * x""",
    ),
    # ------------------------------------------------- bending the tests
    Attack(
        "an input transformer",
        """shell = get_ipython()
def without_tests(lines):
    return [line for line in lines if 'assert' not in line]
shell.input_transformers_cleanup.append(without_tests)
shell.input_transformers_post.append(without_tests)
def double(x): return x""",
    ),
    Attack(
        "a transformer of syntax",
        """import ast
class NoTests(ast.NodeTransformer):
    def visit_Assert(self, node): return ast.Pass()
get_ipython().ast_transformers.append(NoTests())
def double(x): return x""",
    ),
    Attack(
        "a hook before each cell",
        """def before(*args): globals()['close'] = print
get_ipython().events.register('pre_run_cell', before)
def double(x): return x""",
    ),
    Attack(
        "a helper replaced in memory",
        """import soflow_edu.grading
soflow_edu.grading.close = lambda *args: True
close = lambda *args: True
def double(x): return x""",
        note="soflow_edu.grading.close =",
    ),
    Attack(
        "a tensor that is always right",
        """import torch
torch.Tensor.abs = lambda self: self * 0
torch.Tensor.__le__ = lambda self, other: torch.tensor(True)
torch.Tensor.__sub__ = lambda self, other: self * 0
def double(x): return x""",
        note="torch.Tensor.abs =",
    ),
    Attack(
        "builtins replaced",
        """import builtins
builtins.all = builtins.abs = lambda *args: True
def double(x): return x""",
    ),
    Attack(
        "an object equal to everything",
        """class Same:
    def __eq__(self, other): return True
    def __sub__(self, other): return self
def double(x): return Same()""",
    ),
    Attack(
        "a number equal to everything",
        """class Same(float):
    def __eq__(self, other): return True
def double(x): return Same(x)""",
    ),
    Attack(
        "a tensor equal to everything",
        """import torch
class Same(torch.Tensor):
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None): return True
def double(x): return torch.zeros(2).as_subclass(Same)""",
    ),
    Attack(
        "what is due, out of the frames",
        """import sys
def double(x):
    frame = sys._getframe()
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            if 'expected' in space: return space['expected']
        frame = frame.f_back""",
    ),
    Attack(
        "what is due, out of the garbage",
        """import gc
def double(x):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and 'expected' in thing: return thing['expected']""",
    ),
    Attack(
        "a code object that raises nothing",
        """class Quiet:
    def __call__(self, x): return x
double = Quiet()""",
    ),
    # ------------------------------------------------- marks and files of others
    Attack(
        "another student's file",
        """with open('VICTIM', 'w') as file:
    file.write('nothing')
"""
        + AT_ONCE,
        note="refused: ",
    ),
    Attack(
        "another student's file removed", "import os\nos.remove('VICTIM')\n" + AT_ONCE
    ),
    Attack(
        "marks of one's own",
        """import os
for folder, _, names in os.walk('MARKS'):
    for name in names:
        with open(os.path.join(folder, name), 'w') as file:
            file.write('1')
"""
        + AT_ONCE,
    ),
    Attack(
        "at the end of the process",
        """import atexit
def late():
    with open('VICTIM', 'w') as file:
        file.write('nothing')
atexit.register(late)
"""
        + AT_ONCE,
    ),
    Attack(
        "a process that stays",
        LIBC
        + """libc.system(
    b"(setsid sh -c 'while :; do echo >> VICTIM; sleep 0.1; done') >/dev/null 2>&1 &")
import time
time.sleep(1)
"""
        + AT_ONCE,
        needs="bubblewrap",  # a call of the C library passes the guard in Python
    ),
    Attack(
        "a process without a trace",
        LIBC
        + """libc.system(
    b"(setsid env -i sh -c 'setsid sleep 301 & setsid sleep 302') >/dev/null 2>&1 &")
"""
        + AT_ONCE,
    ),
    Attack("a program", "import os\nos.system('true')\n" + AT_ONCE, note="os.system"),
    Attack("a fork", "import os\nif os.fork() == 0:\n    while True: pass\n" + AT_ONCE),
    Attack(
        "the end of the marker",
        "import os\nos.kill(os.getppid(), 9)\n" + AT_ONCE,
        note="os.kill",
    ),
    Attack(
        "the network",
        """import socket
socket.create_connection(('127.0.0.1', 22), 1)
"""
        + AT_ONCE,
        note="socket",
    ),
    # ------------------------------------------------- more than its share
    Attack("an endless loop", "def double(x):\n    while True: pass"),
    Attack(
        "a loop that cannot be interrupted",
        """def double(x):
    while True:
        try:
            while True: pass
        except BaseException: pass""",
    ),
    Attack(
        "a loop without a clock",
        """import signal
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.setitimer = print
def double(x):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    while True: pass""",
    ),
    Attack("the end of the process", "import os\ndef double(x): os._exit(0)"),
    Attack("an exit", "import sys\ndef double(x): sys.exit(0)"),
    Attack("a crash", "import ctypes\ndef double(x): ctypes.string_at(0)"),
    Attack("all memory at once", "def double(x): return len(bytearray(40 * 2**30))"),
    Attack(
        "all memory, bit by bit",
        """def double(x):
    kept = []
    while True: kept.append(b'x' * 2**26)""",
    ),
    Attack("a great result", "import torch\ndef double(x): return torch.zeros(2**28)"),
    Attack(
        "a deep result",
        """def double(x):
    for _ in range(10**5): x = [x]
    return x""",
    ),
    Attack(
        "a great file",
        """def double(x):
    with open('great', 'wb') as file:
        for _ in range(1000): file.write(bytes(2**24))
    return x""",
    ),
    Attack(
        "many files",
        """import time
def double(x):
    for k in range(100):
        with open(f'file-{k}', 'wb') as file: file.write(bytes(2**23))
    time.sleep(3)""",
        note="too many files",
    ),
    Attack(
        "many processes",
        LIBC
        + """import time
for _ in range(150): libc.system(b'sleep 300 >/dev/null 2>&1 &')
time.sleep(3)
"""
        + AT_ONCE,
        note="too many processes",
    ),
    Attack(
        "noise where answers go",
        """import os
def double(x):
    for file in range(3, 40):
        try: os.write(file, b'noise' * 99)
        except OSError: pass""",
    ),
    Attack("closed channels", "import os\ndef double(x): os.closerange(0, 999)"),
    Attack("depth without end", "def double(x): return double(x)"),
    Attack("brackets without end", "x = " + "(" * 10**5 + ")" * 10**5),
    Attack("no function", "double = None"),
]
# Notebooks that are damaged rather than hostile: bytes or changes of the file.
TORN = {"torn": "0", "not text": "?", "numbers for text": "?", "deep nesting": "?"}


def write_solved(folder: Path) -> Assignment:
    "The assignment, as a solved notebook in a folder."
    cells = []
    for k, part in enumerate(NOTEBOOK.split("\n=== ")[1:]):
        kind, _, source = part.partition("\n")
        cell = {"cell_type": kind, "id": f"cell-{k}", "metadata": {}}
        cells.append(cell | {"source": source.strip("\n")})
    write_notebook(folder / "small.ipynb", cells, "small")
    return read_assignment(folder / "small.ipynb")


def answered(assignment: Assignment, answer: str, student: str) -> list[dict]:
    "The cells of a submission with an answer to question 1, and a right one to 2."
    sources = {"question-1": answer, "question-2": NEXT}
    sources["identifier"] = f"identifier = {student!r}"
    cells = json.loads(json.dumps(student_cells(assignment)))
    for cell in cells:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        cell["source"] = sources.get(name, cell["source"])
    return cells


def as_bytes(cells: list[dict]) -> bytes:
    "A notebook as its file holds it; half characters are written as JSON writes them."
    metadata = {"soflow_edu": {"assignment": "small"}}
    notebook = {
        "cells": cells,
        "metadata": metadata,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook).encode()


def damaged(assignment: Assignment, kind: str) -> bytes:
    "A notebook with one of the faults in TORN."
    cells = answered(assignment, RIGHT, kind)
    whole = as_bytes(cells)
    if kind == "torn":
        return whole[:400]
    if kind == "not text":
        return b"\x80\x81" + whole
    if kind == "deep nesting":
        return whole.replace(b'"metadata": {}', b'"metadata": ' + b"[" * 10**6, 1)
    cells[0]["source"] = 5
    return as_bytes(cells)


class SmallClass:
    "A class with a hostile student, and what the student must not reach."

    def __init__(self, folder):
        grading.adopt()
        self.solved = folder / "solved"
        self.home = folder / "submissions"
        self.marks = folder / "marks"
        self.assignment = write_solved(self.solved)
        self.victim = self.write("zoe", RIGHT)
        self.whole = self.victim.read_bytes()
        self.marks.mkdir()
        (self.marks / "marks.csv").write_text("0")
        (self.marks / "nbgrader").mkdir()
        (self.marks / "nbgrader/gradebook.db").touch()

    def write(self, student, answer):
        path = self.home / student / "small.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        for word, place in (
            ("SOLVED", self.solved),
            ("VICTIM", self.home / "zoe/small.ipynb"),
            ("MARKS", self.marks),
        ):
            answer = answer.replace(word, str(place))
        cells = answered(self.assignment, answer, student)
        path.write_bytes(as_bytes(cells))
        return path

    def examine(self, answer, seconds=4):
        "The points of both questions, and what is to be looked at."
        a = self.assignment
        staged = grading.staged_file(a, self.write("eve", answer), "eve")
        tests = {q.graded_name: q.tests["source"] for q in a.questions}
        for cell in staged.cells:
            name = grading.tag_of(cell).get("grade_id")
            cell["source"] = tests.get(name, cell["source"])
        places = (self.solved, self.home, self.marks)
        closed = grading.closed_folders(*places)
        taken = grading.Examining(a, staged.cells, "eve", seconds, closed)
        taken.take()
        errors = {}
        for k, error in taken.errors.items():
            errors[grading.tag_of(staged.cells[k]).get("grade_id")] = error
        points = ["0" if errors[name] else "1" for name in tests]
        return points, [*taken.remarks, *grading.unusual(staged.cells)]

    def stands(self, attack, fence):
        "What an attack reached that it should not, one line each."
        before = grading.children()
        points, look = self.examine(attack.answer)
        found = []
        if grading.children() != before:
            found.append("something is left of it")
        if fence == "python" and attack.needs:
            return found
        if points != [attack.due, attack.second]:
            found.append(f"points {points}, due {[attack.due, attack.second]}")
        if attack.note not in " ".join(look):
            found.append(f"the notes lack {attack.note!r}")
        if self.victim.read_bytes() != self.whole:
            found.append("another student's file was changed")
        if (self.marks / "marks.csv").read_text() != "0":
            found.append("marks were changed")
        return found
