"""``python -m ctxdocs.training.bundled --data DIR --output DIR --minutes 60``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ctxdocs.errors import CtxdocsError
from ctxdocs.training.bundled.recipe import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data, train, measure; what is there already is not done again. Returns the exit code."""
    options = _parser().parse_args(arguments)
    import torch

    from ctxdocs.training.bundled.data import prepare
    from ctxdocs.training.bundled.train import train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = PRESETS[options.preset].vocabulary
    output: Path = options.output
    cache = (options.cache or output.with_name(f"{output.name}-data")) / str(vocabulary)
    try:
        if options.data:
            prepare(options.data, cache, vocabulary, options.init and options.init / "tokenizer.json")
        if not options.evaluate_only:
            train(cache, output, options.preset, options.minutes, device, options.compile, init=options.init)
        measure(cache, output, device)
    except CtxdocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    # argparse, because training machines have torch and transformers but not always the command line's packages.
    parser = argparse.ArgumentParser(prog="python -m ctxdocs.training.bundled", description=main.__doc__)
    parser.add_argument("--data", type=Path, help="folder with lm/ and qa/ (JSON lines)")
    parser.add_argument("--output", type=Path, required=True, help="what load_compressor will load")
    parser.add_argument("--cache", type=Path, help="prepared data; default: OUTPUT-data")
    parser.add_argument("--init", type=Path, help="folder of an earlier run whose language model and tokenizer to take")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-small", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="training time over all runs into OUTPUT; default: %(default)s"
    )
    parser.add_argument("--device", help="torch device; default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--evaluate-only", action="store_true", help="measure OUTPUT and write its model card")
    return parser


def measure(cache: Path, output: Path, device: str) -> None:
    """Evaluate the saved compressor on the test split; write ``evaluation.json`` and the model card."""
    from ctxdocs.checkpoints import load_compressor
    from ctxdocs.training.bundled.card import write_card
    from ctxdocs.training.bundled.checkpoint import LOG, Progress
    from ctxdocs.training.bundled.data import load_split
    from ctxdocs.training.bundled.evaluate import evaluate
    from ctxdocs.training.bundled.memories import memories_of

    compressor = load_compressor(output, device=device, dtype="float32")
    memories_of(compressor)  # raises where it is not one of this script's
    figures = evaluate(compressor, load_split(cache, "test"))
    text = json.dumps(figures, indent=1, default=dataclasses.asdict)
    (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    prepared = json.loads((cache / "prepared.json").read_text(encoding="utf-8"))
    write_card(output, compressor, Progress.load(output / LOG), figures, prepared)


if __name__ == "__main__":
    sys.exit(main())
