"""``ctxdocs serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ctxdocs.cli.options import device_option, json_option, library_option, open_library
from ctxdocs.cli.output import clean, counted, print_json, silence, terminal
from ctxdocs.errors import InputError

_KEYS = "CTXDOCS_API_KEYS"


@click.command()
@library_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What clients call the model; default: the checkpoint's name.")
@click.option(
    "--api-keys",
    "keys_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"A file with an API key on each line. Or set {_KEYS}: keys, parted by commas.",
)
@click.option("--no-key", is_flag=True, help="Let everybody who reaches --host use the server without a key.")
@click.option("--read-only", is_flag=True, help="Let nobody add or remove documents.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Answer to this host name too.")
@click.option("--batch-size", type=int, help="Answers that are written at once.")
@click.option("--queue-size", type=int, help="Requests that may wait; more are told to come again.")
@click.option("--request-seconds", type=float, help="How long an answer may take, waiting included.")
@click.option("--max-new-tokens", type=int, help="Longest answer that can be asked for.")
@click.option("--upload-bytes", type=int, help="Largest document that can be uploaded.")
@click.option("--model", metavar="NAME", help="Where the library's compressor is, if it has moved.")
@device_option
@json_option
def serve(
    library_path: Path,
    host: str,
    port: int,
    keys_file: Path | None,
    no_key: bool,
    read_only: bool,
    hosts: tuple[str, ...],
    model: str | None,
    device: str,
    as_json: bool,
    **limits: Any,
) -> None:
    """Serve a library over HTTP: OpenAI's API, search, uploads, and a page to try it in.

    Ctrl-C ends it, once the answers that have been begun are written.
    """
    from ctxdocs.integrations.server import Settings
    from ctxdocs.integrations.server.running import is_loopback, listen, make_server

    keys = _keys(keys_file)
    chosen = {name: value for name, value in limits.items() if value is not None}
    access: Any = "read" if read_only else "write"
    if no_key and not is_loopback(host):
        hosts = ("*",)
    settings = Settings(keys=keys, access=access, hosts=hosts, **chosen)
    library = open_library(library_path, model, device)
    silence()
    with listen(host, port, settings) as listening:
        library.load()
        server = make_server(library, settings)
        address, taken = listening.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{taken}"
        if as_json:
            print_json({"url": url, "model": server.model_name, "library": str(library.path), "keys": len(keys)})
        else:
            console = terminal(sys.stdout)
            console.print(f"Serving {clean(server.model_name)} at {url} ({_guarded(keys, no_key)}).", style="bold")
            console.print(f"OpenAI's API is at {url}/v1, a page at {url}/. Ctrl-C ends.")
        sys.stdout.flush()
        server.run([listening])


def _guarded(keys: tuple[str, ...], no_key: bool) -> str:
    return counted(len(keys), "API key") if keys else "no API key" if no_key else "this machine only, no API key"


def _keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys; they come from a file or the environment, where other users do not see them."""
    if file is None:
        lines = os.environ.get(_KEYS, "").split(",")
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the API keys cannot be read ({error})") from error
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if file is not None and not keys:
        raise InputError(f"{file} holds no API key", "write one on each line")
    return tuple(keys)
