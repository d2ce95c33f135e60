"""Reads every piece of package metadata from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]


def lines(key):
    return [line.strip() for line in meta.get(key, "").splitlines() if line.strip()]


extras = {}
for key in meta:
    if key.endswith("_requirements"):
        extras[key.removesuffix("_requirements")] = lines(key)
files = [
    "py.typed",
    "catalogue.json",
    "configs/*.yaml",
    "frames/*.safetensors",
    "frames/SHA256SUMS",
    "page/*",
]
setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    license_files=["LICENSE"],
    keywords=meta["keywords"].split(),
    url=meta["git_url"] or None,
    packages=find_packages(include=["soflow_edu", "soflow_edu.*"]),
    package_data={"soflow_edu": files},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts")},
)
