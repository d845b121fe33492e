"""Packages of the distribution; everything else about it stands in pyproject.toml."""

from setuptools import find_packages, setup

# `integrations/` stands beside `qm_spec/` in the tree and is installed below it.
setup(
    packages=[
        *find_packages(include=["qm_spec", "qm_spec.*"]),
        "qm_spec.integrations",
        *(f"qm_spec.integrations.{name}" for name in find_packages("integrations")),
    ],
    package_dir={"qm_spec.integrations": "integrations"},
)
