"""Read the version and the requirements from settings.ini, where nbdev keeps them."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser()
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
options = settings["DEFAULT"]
setup(
    version=options["version"],
    description=options["description"],
    install_requires=options["requirements"].split("\n")[1:],
    extras_require={"dev": options["dev_requirements"].split("\n")[1:],
                    "transformers": options["transformers_requirements"].split("\n")[1:]},
)
