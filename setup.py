"""The one part that is compiled; everything else about the packages is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lunatrain._gather",
            ["lunatrain/gather.c"],
            py_limited_api=True,
            optional=True,  # without a compiler NumPy does the same, at two thirds of the speed (lunatrain/mapping.py)
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
