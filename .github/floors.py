"""Prints the oldest versions that setup.cfg allows, as arguments of pip; torch comes from its own index."""

import configparser
from pathlib import Path

read = configparser.ConfigParser()
read.read(Path(__file__).parents[1] / "setup.cfg", "utf-8")
lines = read["options"]["install_requires"].split("\n")
pairs = [line.split(">=") for line in lines if ">=" in line and not line.startswith("torch")]
print(*(f"{name.strip()}=={version.strip()}" for name, version in pairs))
