from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "sorna_jupyter/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="sorna-jupyter",
    version=VERSION,
    description="Where a program's sandbox and a person's notebook are the same live kernel",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["sorna_jupyter", "sorna_jupyter.*"]),
        *find_packages("agent"),
        "sorna_kernelspecs",
    ],
    package_dir={"sorna_agent": "agent/sorna_agent", "sorna_kernelspecs": "kernelspecs"},
    package_data={
        "sorna_jupyter": ["py.typed", "registry/alembic.ini", "registry/migrations/*.mako"],
        "sorna_agent": ["py.typed", "runtimes/*.json"],
        "sorna_kernelspecs": ["*/*"],
    },
    install_requires=[
        "jupyter_server>=2.21",
        "notebook>=7.6",
        # What draws the widgets of kernels that bring ipywidgets; front-ends look for it here.
        "jupyterlab_widgets>=3.0.15",
        "jupyter_client>=8.10",
        "ipykernel>=7.4",
        "nbformat>=5.10",
        "tornado>=6.6",
        "traitlets>=5.16",
        "pyzmq>=27",
        "docker>=7.2",
        "SQLAlchemy>=2.1",
        "alembic>=1.20",
        "psycopg2-binary>=2.9.13",
        "redis>=8",
        "msgspec>=0.22",
        # Checksums in the journal, ten times faster than zlib's crc32.
        "xxhash>=4",
        "requests>=2.32",
        "rich>=15",
        # The only maintained binding of Linux' Landlock; has had no final release yet.
        "landlock>=1.0.0.dev5; sys_platform == 'linux'",
    ],
    extras_require={
        # What `python -m benchmarks` compares us with, and what draws its chart.
        "bench": ["jupyter_kernel_gateway>=3.0.1", "matplotlib"],
        "test": [
            "pytest>=9",
            "pytest-asyncio>=1",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "ruff>=0.17",
            "mypy>=2.4",
            "import-linter>=2.16",
            "types-requests",
            "types-docker",
            "jupyterlab>=4.6",
            "jupyter_console>=6.6",
            "jupyter_kernel_test>=0.7",
            "nbclient>=0.10",
            "nbconvert>=7.16",
            "papermill>=2.6",
            "ipywidgets>=8.1",
            "numpy",
            "pandas",
            "matplotlib",
            "jsonschema",
            "openapi-spec-validator",
            "pexpect>=4.9",
            "selenium>=4.51",
        ],
    },
    entry_points={
        "console_scripts": [
            "jupyter-sorna = sorna_jupyter.cli:main",
            "jupyter-sorna-agent = sorna_agent.app:main",
        ],
    },
    classifiers=[
        "Framework :: Jupyter",
        "License :: OSI Approved :: BSD License",
        "Programming Language :: Python :: 3",
    ],
    zip_safe=False,
)
