"""A library behind OpenAI's API: starts ``ctxdocs serve``, and asks it with OpenAI's own client.

    python examples/server_client.py

Runs offline with the bundled model. Needs the extras ``serve`` and ``offline``, and ``pip install openai``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from openai import NotFoundError, OpenAI

import ctxdocs

CORPUS = Path(__file__).parent / "corpus" / "history"
QUESTION = "When was the station opened?"


def main() -> None:
    """Compress a few documents, serve them, ask, and end the server."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        library.add(CORPUS)
        command = [
            sys.executable,
            "-m",
            "ctxdocs.cli",
            "serve",
            "--library",
            str(library.path),
            "--port",
            "0",
            "--json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                ask(json.loads(server.stdout.readline())["url"])
            finally:
                server.terminate()
        print(f"the server ended with status {server.returncode}")


def ask(url: str) -> None:
    """Ask a server by OpenAI's client."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none needed on this machine")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": QUESTION}]
    print(f"{QUESTION} ({model})")
    for mode in ("memory", "text"):
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=16, extra_body={"mode": mode, "k": 2}
        )
        took = answer.usage.ctxdocs
        print(f"\nreading {mode}: {answer.choices[0].message.content!r}")
        print(f"  {answer.usage.prompt_tokens} prompt tokens and {took['memory_slots']} memory slots")
        print(f"  from {[Path(source['document']).name for source in took['sources']]}")

    print("\nstreamed: ", end="")
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=16, stream=True)
    for part in stream:
        print(part.choices[0].delta.content or "", end="", flush=True)
    print()

    try:
        client.chat.completions.create(model="gpt-4", messages=messages)
    except NotFoundError as error:
        print(f"\nanother model: {error.body['message']}")


if __name__ == "__main__":
    main()
