"""Maps the repository's folders to packages: ``kernels/`` is installed as ``fastkd.kernels``.

Everything declarative is in pyproject.toml. The C++/CUDA extension of ``csrc/`` is added to ``ext_modules`` here;
a build happens at install time only, never at import.
"""

from setuptools import setup

setup(
    packages=["fastkd", "fastkd.backends", "fastkd.losses", "fastkd.ops", "fastkd.trainer", "fastkd.kernels"],
    package_dir={"fastkd": "fastkd", "fastkd.kernels": "kernels"},
    package_data={"fastkd": ["py.typed", "trainer/*.html"]},
    ext_modules=[],
)
