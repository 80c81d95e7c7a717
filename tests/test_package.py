"""What installs: a light import, every subpackage, the typing marker, lazily resolved public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import ctxdocs

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "transformers", "faiss", "sentence_transformers", "numpy", "langchain_core", "llama_index", "rich"]


def test_importing_is_light():
    code = f"import sys, ctxdocs; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_shows_its_help_without_torch():
    code = f"""
import sys
from ctxdocs.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print([name for name in {HEAVY[:5]} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_public_names_resolve():
    for name in ctxdocs.__all__:
        assert getattr(ctxdocs, name).__name__ == name
    assert set(ctxdocs.__all__) <= set(dir(ctxdocs))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ctxdocs.nothing


def test_every_package_folder_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: ROOT / path for name, path in settings["package-dir"].items()} | {"ctxdocs": ROOT / "ctxdocs"}
    found = set()
    for package, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(folder).parts]))
    assert found == set(settings["packages"])
    assert (ROOT / "ctxdocs" / "py.typed").is_file()
