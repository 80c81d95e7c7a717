"""A served library under load: answers written together against one at a time, from memory against from text.

Run ``python benchmarks/serve.py``; ``benchmarks/README.md`` says what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Spread

from ctxdocs.errors import CtxdocsError, InputError
from ctxdocs.library import Library

EXAMPLES = Path(__file__).parents[1] / "examples"
MODES = ("memory", "text")
_LIMIT_SECONDS = 600
_TRIES = 100


@dataclass
class Burst:
    """What came of many requests at once.

    Parameters
    ----------
    seconds : float
        From the first request to the last answer.
    answers : list of str or None
        What was answered to each request; None where nothing came or an error.
    first_tokens : list of float
        Seconds from each answered request's arrival to its first token, as the server counts them.
    sent_away : int
        Requests that were told to come again (429), and came again.
    """

    seconds: float
    answers: list[str | None]
    first_tokens: list[float]
    sent_away: int


@contextmanager
def served(library: Path, *arguments: str) -> Iterator[str]:
    """Serve a library in a process of its own; yields the address, and sees that the server ends when it is told to."""
    command = [sys.executable, "-m", "ctxdocs.cli", "serve", "--library", str(library), "--port", "0", "--json"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise InputError("the server did not start")
            yield json.loads(said)["url"]
        finally:
            process.terminate()
    if process.returncode:
        raise CtxdocsError(f"the server ended with status {process.returncode}")


async def burst(url: str, questions: Sequence[str], mode: str, options: argparse.Namespace) -> Burst:
    """Send requests all at once, every fourth one streamed, and wait for all answers."""
    import httpx

    answers: list[str | None] = [None] * len(questions)
    first_tokens: list[float] = []
    sent_away = 0

    async def ask(client: httpx.AsyncClient, index: int) -> None:
        nonlocal sent_away
        body = {
            "model": (await client.get("/v1/models")).json()["data"][0]["id"],
            "messages": [{"role": "user", "content": questions[index]}],
            "max_tokens": options.new_tokens,
            "mode": mode,
            "k": options.k,
            **({"stream": True, "stream_options": {"include_usage": True}} if index % 4 == 0 else {}),
        }
        for _ in range(_TRIES):
            response = await client.post("/v1/chat/completions", json=body)
            if response.status_code != 429:
                break
            sent_away += 1
            await asyncio.sleep(float(response.headers["retry-after"]))
        if response.status_code == 200:
            answers[index], usage = _read(response.text) if "stream" in body else _whole(response.json())
            first_tokens.append(usage["ctxdocs"]["time_to_first_token"])

    limits = httpx.Limits(max_connections=len(questions))
    async with httpx.AsyncClient(base_url=url, timeout=_LIMIT_SECONDS, limits=limits) as client:
        start = time.perf_counter()
        await asyncio.gather(*[ask(client, index) for index in range(len(questions))])
        return Burst(time.perf_counter() - start, answers, first_tokens, sent_away)


def _whole(response: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return response["choices"][0]["message"]["content"], response["usage"]


def _read(stream: str) -> tuple[str | None, dict[str, Any]]:
    """Join a stream's pieces; None for a stream without an end."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    parts = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(choice["delta"].get("content") or "" for part in parts for choice in part.get("choices", []))
    return (text if events[-1] == "[DONE]" else None), parts[-1]["usage"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve a library twice, with batches and without, and send both the same requests in turn."""
    questions = _questions(options)
    kinds = {"one by one": 1, "together": options.batch_size}
    bursts: dict[tuple[str, str], list[Burst]] = {(kind, mode): [] for kind in kinds for mode in MODES}
    with ExitStack() as stack:
        if options.library is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "library"
            Library.create(folder).add(EXAMPLES / "corpus")
        else:
            folder = options.library
        limits = ["--queue-size", str(options.queue_size), "--request-seconds", str(_LIMIT_SECONDS)]
        urls = {
            kind: stack.enter_context(served(folder, "--batch-size", str(size), *limits))
            for kind, size in kinds.items()
        }
        for number in range(measure.WARMUP_ROUNDS + options.rounds):
            for (kind, mode), done in bursts.items():
                came = asyncio.run(burst(urls[kind], questions, mode, options))
                if number >= measure.WARMUP_ROUNDS:
                    done.append(came)
    return {
        "benchmark": "serve",
        "command": measure.command_line(),
        "environment": measure.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "requests": options.requests,
        "load": [_row(kind, mode, bursts) for kind, mode in bursts],
    }


def _row(kind: str, mode: str, bursts: dict[tuple[str, str], list[Burst]]) -> dict[str, Any]:
    done = bursts[kind, mode]
    alone, text = bursts["one by one", mode], bursts[kind, "text"]
    return {
        "answers": kind,
        "mode": mode,
        "lost": sum(answer is None for each in done for answer in each.answers),
        "other answers": sum(
            a != b
            for each, other in zip(done, alone, strict=True)
            for a, b in zip(each.answers, other.answers, strict=True)
        ),
        "told to come again": sum(each.sent_away for each in done),
        "requests/s": Spread.of([len(each.answers) / each.seconds for each in done]),
        "of one by one": Spread.of_ratios([each.seconds for each in alone], [each.seconds for each in done]),
        "of text": Spread.of_ratios([each.seconds for each in text], [each.seconds for each in done]),
        "first token, median s": Spread.of([_quantile(each.first_tokens, 0.5) for each in done]),
        "95th of 100, s": Spread.of([_quantile(each.first_tokens, 0.95) for each in done]),
    }


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))] if values else float("nan")


def _questions(options: argparse.Namespace) -> list[str]:
    file = options.questions or EXAMPLES / "questions.jsonl"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{file} holds no questions")
    asked = [json.loads(line)["question"] if line.startswith("{") else line for line in lines]
    return [asked[index % len(asked)] for index in range(options.requests)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="what is served (default: the example corpus, compressed anew)")
    parser.add_argument("--questions", type=Path, help="a file of questions, one per line (default: the examples')")
    parser.add_argument("--requests", type=int, default=200, help="requests sent at once (default: 200)")
    parser.add_argument("--new-tokens", type=int, default=16, help="longest answer (default: 16)")
    parser.add_argument("--k", type=int, default=4, help="chunks that are read for each (default: 4)")
    parser.add_argument("--batch-size", type=int, default=16, help="answers written together (default: 16)")
    parser.add_argument("--queue-size", type=int, default=128, help="requests that may wait (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--output", type=Path, help="write the figures to this file, as JSON")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    try:
        result = run(options)
    except CtxdocsError as error:
        raise SystemExit(f"error: {error}") from error
    measure.table(f"{options.requests} requests at once, up to {options.new_tokens} tokens each", result["load"])
    measure.write_json(options.output, result)


if __name__ == "__main__":
    main()
