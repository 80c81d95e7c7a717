"""``python -m tests.parity FOLDER...``: one line per case, exit 1 if a required case does not pass."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

from .case import Case, Outcome, Unsupported


def run(folder: Path) -> Outcome:
    """Run one case; an error in ctxdocs is a failure of the case, not of the runner."""
    case = Case.load(folder)
    outcome = Outcome(case)
    try:
        importlib.import_module(f"tests.parity.{case.method}").run(case, outcome)
    except ModuleNotFoundError as error:
        if error.name != f"tests.parity.{case.method}":
            raise
        outcome.unsupported = f"no method {case.method}"
    except Unsupported as error:
        outcome.unsupported = str(error)
    except Exception as error:  # whatever it is, it is this case's failure
        outcome.differing.append(f"{type(error).__name__}: {error}")
    return outcome


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python -m tests.parity FOLDER...", file=sys.stderr)
        return 2
    folders = sorted({path.parent for argument in arguments for path in Path(argument).rglob("case.json")})
    counts: Counter[str] = Counter()
    must_pass = True
    for folder in folders:
        outcome = run(folder)
        print(outcome.line(), flush=True)
        counts[outcome.verdict] += 1
        must_pass &= outcome.verdict == "PASS" or outcome.case.tier != "required"
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['UNSUPPORTED']} unsupported")
    return 0 if folders and must_pass else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
