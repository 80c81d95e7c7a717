"""Everything that is due on a GPU, in one command with a time limit: tests marked gpu, then the benchmarks.

Run ``python benchmarks/gpu.py --minutes 9``. Each step is a process of its own with a limit of its own: one that
fails, or that time ran out for, is recorded, and the others run. The results file is rewritten after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import measure
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHAPES = ("0.1b", "1b", "7b")
#: Of ``kv.py``.
_KV_SHAPES = ("1b", "8b")
_LEAST_SECONDS = 15
_KEPT_LINES = 25


@dataclass(frozen=True)
class Sizes:
    """How much the steps measure.

    Parameters
    ----------
    documents : tuple of int
        For ``methods.py``: with the first shape and with the last.
    document_tokens : int
        Length of each.
    pages, tokens : int
        Pages that ``compress.py`` takes its chunks from, and tokens of all chunks.
    longest : int
        Longest prompt of ``ask.py``, in tokens.
    library : int
        Pages of a library.
    kv_tokens : tuple of int
        Documents of ``kv.py``.
    rounds : int
        Timed rounds of each comparison.
    """

    documents: tuple[int, int]
    document_tokens: int
    pages: int
    tokens: int
    longest: int
    library: int
    kv_tokens: tuple[int, ...]
    rounds: int


_ON_GPU = Sizes(
    # A small model needs more documents to keep a GPU busy, and takes no longer for them.
    documents=(128, 16),
    document_tokens=2048,
    pages=300,
    tokens=65536,
    longest=65536,
    library=600,
    kv_tokens=(1024, 4096, 16384, 32768),
    rounds=3,
)
#: Just enough to try every command out.
_ON_CPU = Sizes(
    documents=(1, 1), document_tokens=200, pages=5, tokens=1024, longest=512, library=5, kv_tokens=(200,), rounds=1
)


@dataclass(frozen=True)
class Step:
    """A command to run, and what of its output to keep.

    Parameters
    ----------
    name : str
        What the results call it.
    command : tuple of str
        Arguments after ``python``.
    seconds : float
        Its limit; less where less is left.
    measures : bool
        Whether it takes ``--output`` and writes JSON there.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    measures: bool = True


def steps(device: str, shapes: Sequence[str]) -> Iterator[Step]:
    """Yield the steps, what matters most first."""
    tests = sorted((ROOT / "tests").glob("**/test_*.py"))
    marked = [str(path) for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
    pytest = ("-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "--import-mode=importlib")
    yield Step("tests", (*pytest, *marked), 120, measures=False)
    sizes = _ON_CPU if device == "cpu" else _ON_GPU
    run = ("--device", device, "--rounds", str(sizes.rounds))
    for shape, count in dict(zip((shapes[0], shapes[-1]), sizes.documents, strict=True)).items():
        documents = ("--documents", str(count), "--document-tokens", str(sizes.document_tokens))
        yield Step(f"methods {shape}", (str(HERE / "methods.py"), "--shapes", shape, *run, *documents), 200)
    for shape in shapes:
        lengths = ("--chunk-tokens", "256", "1536", "--documents", str(sizes.pages), "--tokens", str(sizes.tokens))
        compress = ("--shape", shape, *run, "--parts", "compress_ids", *lengths)
        yield Step(f"compress {shape}", (str(HERE / "compress.py"), *compress), 100)
        ask = ("--shape", shape, *run, "--longest", str(sizes.longest))
        yield Step(f"ask {shape}", (str(HERE / "ask.py"), *ask), 60)
    for shape in _KV_SHAPES if device != "cpu" else shapes[:1]:
        parts = ("--parts", "compressing", "reading", "scoring", "--document-tokens", *map(str, sizes.kv_tokens))
        yield Step(f"kv {shape}", (str(HERE / "kv.py"), "--shapes", shape, *run, *parts), 100)
    library = ("--shape", shapes[0], *run, "--parts", "library", "memory", "--documents", str(sizes.library))
    yield Step(f"library {shapes[0]}", (str(HERE / "compress.py"), *library), 100)


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Run a step for at most ``seconds``; return its outcome, whatever it is."""
    record: dict[str, Any] = {"step": step.name, "command": shlex.join(["python", *_relative(step.command)])}
    if seconds < _LEAST_SECONDS:
        return record | {"outcome": "skipped", "reason": "no time left"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        output, log = Path(scratch, "result.json"), Path(scratch, "log.txt")
        command = [sys.executable, *step.command, *(["--output", str(output)] if step.measures else [])]
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if step.command[0] == "-m":
            # Else the working folder comes first, and the checkout's ctxdocs/ hides an installed package.
            settings["PYTHONSAFEPATH"] = "1"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=settings, start_new_session=True
            )
            try:
                code = process.wait(seconds)
                record["outcome"] = f"failed with exit status {code}" if code else "done"
            except subprocess.TimeoutExpired:
                record["outcome"] = f"stopped after {seconds:.0f} s"
            finally:
                # The whole group: a step may have started processes of its own.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text, flush=True)
        record["seconds"] = round(time.perf_counter() - started, 1)
        if output.is_file():
            record["result"] = json.loads(output.read_text(encoding="utf-8"))
        else:
            record["log"] = text.splitlines()[-_KEPT_LINES:]
    return record


def _relative(command: Sequence[str]) -> list[str]:
    """Spell the checkout's own files without the folder it lies in."""
    return [argument.replace(f"{ROOT}{os.sep}", "") for argument in command]


def main() -> None:
    """Run the steps and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="limit for everything (default: 9)")
    parser.add_argument("--device", default="cuda", help="cpu tries the commands out where there is no GPU")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="model sizes (default: 0.1b 1b 7b)")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/<device>-<date>.json)")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU here (--device cpu tries the commands out)")
    end = time.perf_counter() + 60 * options.minutes - 5
    device = torch.device(options.device)
    now = datetime.now(timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", measure.device_name(device).lower()).strip("-")
    path = options.output or HERE / "results" / f"{slug}-{now:%Y-%m-%d}.json"
    result: dict[str, Any] = {
        "command": measure.command_line(),
        "date": now.isoformat(timespec="seconds"),
        "environment": measure.environment(device),
        "steps": [],
    }
    for step in steps(options.device, options.shapes):
        left = end - time.perf_counter()
        print(f"\n== {step.name} ({left:.0f} s left)", flush=True)
        result["steps"].append(run_step(step, min(step.seconds, left)))
        measure.write_json(path, result)
    print()
    for record in result["steps"]:
        print(f"{record['step']:>16}  {record['outcome']}  {record.get('seconds', 0)} s")
    if any(record["outcome"].startswith("failed") for record in result["steps"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
