"One-step generative modelling by solution functions: each module is exported from the chapter of the same name in nbs/."


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("soflow_edu")
    raise AttributeError(f"module 'soflow_edu' has no attribute {name!r}")
