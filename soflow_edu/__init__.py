"""One-step generative modelling by solution functions.

Each module is exported from the chapter of the same name in nbs/. The names below are
what most programs need; a module is imported when one of them is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soflow_edu.comparing import compare
    from soflow_edu.config import Config, load_config, make_config, read_yaml, to_yaml
    from soflow_edu.core import (
        InputError,
        build,
        describe,
        find,
        import_components,
        names,
        register,
    )
    from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
    from soflow_edu.odes import ExactFlow, OdeFlow, integrate
    from soflow_edu.sampling import sample
    from soflow_edu.solution import SolutionModel
    from soflow_edu.training import (
        assemble,
        finish,
        load_run,
        resume_run,
        save_run,
        train,
        trained,
    )

HOMES = {
    "Config": "config",
    "ExactFlow": "odes",
    "FiniteSet": "distributions",
    "GaussianMixture": "distributions",
    "InputError": "core",
    "OdeFlow": "odes",
    "SolutionModel": "solution",
    "assemble": "training",
    "build": "core",
    "compare": "comparing",
    "describe": "core",
    "find": "core",
    "finish": "training",
    "import_components": "core",
    "integrate": "odes",
    "law_of": "distributions",
    "load_config": "config",
    "load_run": "training",
    "make_config": "config",
    "names": "core",
    "read_yaml": "config",
    "register": "core",
    "resume_run": "training",
    "sample": "sampling",
    "save_run": "training",
    "to_yaml": "config",
    "train": "training",
    "trained": "training",
}
__all__ = [
    "Config",
    "ExactFlow",
    "FiniteSet",
    "GaussianMixture",
    "InputError",
    "OdeFlow",
    "SolutionModel",
    "assemble",
    "build",
    "compare",
    "describe",
    "find",
    "finish",
    "import_components",
    "integrate",
    "law_of",
    "load_config",
    "load_run",
    "make_config",
    "names",
    "read_yaml",
    "register",
    "resume_run",
    "sample",
    "save_run",
    "to_yaml",
    "train",
    "trained",
]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("soflow_edu")
    if name not in HOMES:
        message = f"module 'soflow_edu' has no attribute {name!r}"
        raise AttributeError(message)
    from importlib import import_module

    value = getattr(import_module(f"soflow_edu.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *HOMES})
