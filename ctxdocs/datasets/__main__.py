"""``python -m ctxdocs.datasets COMMAND ...``: count, convert, split, mix, tokenize, overlap."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ctxdocs.datasets.converting import RecordCounts, convert, count_records
from ctxdocs.datasets.formats import FORMATS
from ctxdocs.datasets.mixing import KINDS, ContextPool, mix_contexts
from ctxdocs.datasets.overlap import OverlapReport, check_overlap
from ctxdocs.datasets.reading import Skipped, read_records, write_records
from ctxdocs.datasets.records import Question
from ctxdocs.datasets.splits import TRAINABLE, split_files
from ctxdocs.errors import CtxdocsError, InputError

_DESCRIPTION = "Count, convert, split, mix, tokenise and compare files of documents and questions."
_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 1 for an error, and for an overlap that was found and not taken out."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code: int = options.run(options)
    except CtxdocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no file was left half written", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    # argparse, because training machines have torch and transformers but not always the command line's packages.
    parser = argparse.ArgumentParser(prog="python -m ctxdocs.datasets", description=_DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    count = _command(commands, "count", _count, "read files and say what they hold, or what is wrong with them")
    count.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of records, or folders of them")

    formats = "; ".join(f"{name}: {form.description}" for name, form in FORMATS.items())
    converting = _command(
        commands, "convert", _convert, "write a published data set as records", f"auto: look at every file; {formats}"
    )
    converting.add_argument("format", metavar="FORMAT", choices=["auto", *FORMATS], help=", ".join(["auto", *FORMATS]))
    converting.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _output(converting, "OUT.jsonl[.zst|.gz]")
    converting.add_argument("--source", help="name of the data set; default: as the records say, or the file's name")
    converting.add_argument("--split", help="split of the questions, such as dev, where they do not say it themselves")

    splitting = _command(commands, "split", _split, "divide files into train, validation and test, by title")
    splitting.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _output(splitting, "DIR")
    splitting.add_argument("--seed", type=int, default=0, help="another seed holds out other titles; default: 0")
    splitting.add_argument("--validation", type=float, default=0.01, help="share; default: %(default)s")
    splitting.add_argument("--test", type=float, default=0.01, help="share; default: %(default)s")
    splitting.add_argument(
        "--published",
        default=",".join(TRAINABLE),
        help="questions of other splits than these, by their publishers, are left out; any: keep all; "
        "default: %(default)s",
    )

    mixing = _command(commands, "mix", _mix, "put distractors beside the contexts of questions")
    mixing.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _output(mixing, "OUT.jsonl[.zst|.gz]")
    mixing.add_argument("--contexts", type=int, default=4, help="per question; default: %(default)s")
    mixing.add_argument("--distractors", choices=KINDS, default="random", help="default: %(default)s")
    mixing.add_argument("--unanswerable", type=float, default=0.0, help="share; default: %(default)s")
    mixing.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    tokenising = _command(commands, "tokenize", _tokenize, "tokenise documents once, into files that are mapped")
    tokenising.add_argument("files", nargs="+", type=Path, metavar="FILE")
    tokenising.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json, or a model's folder")
    _output(tokenising, "STEM")

    overlap = _command(commands, "overlap", _overlap, "find training records that share runs of words with test data")
    overlap.add_argument("--train", nargs="+", type=Path, required=True, metavar="FILE")
    overlap.add_argument("--test", nargs="+", type=Path, required=True, metavar="FILE")
    overlap.add_argument("--n", type=int, default=13, help="words per run; default: %(default)s")
    overlap.add_argument(
        "--compare",
        choices=["answers", "contexts"],
        default="answers",
        help="what of a test question counts: the sentences with its answer, or its relevant contexts; "
        "default: %(default)s",
    )
    overlap.add_argument("--write-clean", type=Path, metavar="OUT", help="write what shares nothing; a file or folder")
    overlap.add_argument(
        "--remove",
        choices=["records", "paragraphs"],
        default="records",
        help="what is taken out: whole records, or paragraphs of documents; default: %(default)s",
    )
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
    parser.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="what a broken record leads to; default: raise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _output(parser: argparse.ArgumentParser, metavar: str) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar=metavar)


def _count(options: argparse.Namespace) -> int:
    skipped = Skipped()
    counts = count_records(read_records(options.files, on_error=options.on_error, skipped=skipped))
    counts.skipped = skipped.count
    _show(options, counts.to_dict())
    return 0


def _convert(options: argparse.Namespace) -> int:
    counts = convert(
        options.format,
        options.files,
        options.output,
        source=options.source,
        split=options.split,
        on_error=options.on_error,
    )
    _show(options, {"output": str(options.output), **counts.to_dict()})
    return 0


def _split(options: argparse.Namespace) -> int:
    report = split_files(
        options.files,
        options.output,
        seed=options.seed,
        validation=options.validation,
        test=options.test,
        published=None if options.published == "any" else options.published.split(","),
        on_error=options.on_error,
    )
    counts = {"left out": report.left_out, "skipped": report.skipped}
    _show(options, {"output": str(options.output), **report.records, **counts})
    return 0


def _mix(options: argparse.Namespace) -> int:
    skipped, counts = Skipped(), RecordCounts()
    questions = _questions(options.files, options.on_error, skipped)
    pool = ContextPool(questions)

    def mixed() -> Iterable[Question]:
        for question in questions:
            new = mix_contexts(
                question,
                pool,
                contexts=options.contexts,
                distractors=options.distractors,
                unanswerable=options.unanswerable,
                seed=options.seed,
            )
            counts.add(new)
            yield new

    write_records(options.output, mixed())
    counts.skipped = skipped.count
    _show(options, {"output": str(options.output), **counts.to_dict()})
    return 0


def _questions(files: Iterable[Path], on_error: Any, skipped: Skipped) -> list[Question]:
    questions = []
    for record in read_records(files, on_error=on_error, skipped=skipped):
        if not isinstance(record, Question):
            raise InputError(f"{record.place}: a document, where questions are mixed", "name files of questions")
        questions.append(record)
    return questions


def _tokenize(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from ctxdocs.datasets.tokenising import load_tokenizer, tokenise_files

    info = tokenise_files(options.files, load_tokenizer(options.tokenizer), options.output, on_error=options.on_error)
    counts = {name: getattr(info, name) for name in ("sequences", "tokens", "vocabulary", "skipped")}
    _show(options, {"output": f"{options.output}.tokens.npy", **counts})
    return 0


def _overlap(options: argparse.Namespace) -> int:
    report = check_overlap(
        options.train,
        options.test,
        n=options.n,
        compare=options.compare,
        output=options.write_clean,
        remove=options.remove,
        on_error=options.on_error,
    )
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        _show_overlaps(report)
    return 1 if report.overlaps and options.write_clean is None else 0


def _show_overlaps(report: OverlapReport) -> None:
    for overlap in report.overlaps[:_SHOWN]:
        runs = f"{overlap.runs:,} run{'s' * (overlap.runs > 1)}"
        print(f"{overlap.train}: {runs}, the first in {overlap.test}: {overlap.words}")
    if len(report.overlaps) > _SHOWN:
        print(f"... and {len(report.overlaps) - _SHOWN:,} more (--json prints all)")
    mostly = sum(2 * found.shared > found.runs for found in report.shared)
    counted = {"overlaps": len(report.overlaps), "shared": len(report.shared), "more_than_half_shared": mostly}
    values = report.to_dict() | counted
    _print_values(values)


def _show(options: argparse.Namespace, values: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(values))
    else:
        _print_values(values)


def _print_values(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


if __name__ == "__main__":
    sys.exit(main())
