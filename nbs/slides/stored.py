"""Pictures and printed lines of the chapters for the slides, read out of the chapters'
notebooks, so that a slide shows what the chapter shows."""

import json
from pathlib import Path

CHAPTERS = Path(__file__).resolve().parent.parent


def outputs(chapter: str, cell: str) -> list[dict]:
    "What the cell with this id printed and drew. KeyError if there is none."
    path = CHAPTERS / f"{chapter}.ipynb"
    for found in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if found["id"] == cell:
            return found["outputs"]
    message = f"{chapter} has no cell {cell}: look for the figure and name its cell."
    raise KeyError(message)


def figure(chapter: str, cell: str) -> None:
    "Shows the picture of a cell with its alternative text."
    from IPython.display import display

    (drawn,) = [out["data"] for out in outputs(chapter, cell) if "data" in out]
    alt = "".join(drawn["text/plain"])
    data = {"image/png": "".join(drawn["image/png"]).strip(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def printed(chapter: str, cell: str, lines: int | None = None) -> None:
    "Shows the first lines that a cell printed, or all."
    texts = ["".join(out["text"]) for out in outputs(chapter, cell) if "text" in out]
    print("\n".join("".join(texts).splitlines()[:lines]))
