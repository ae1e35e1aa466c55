"""The kernel images that come with Sorna: one folder each, with Dockerfile and kernel.json."""

from pathlib import Path

PATH = Path(__file__).parent
