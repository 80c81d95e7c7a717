"""``python -m tests.parity FOLDER...``: one line per case, exit 1 if a required case does not pass."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

from .case import Case, Outcome, Unsupported


def run(folder: Path) -> Outcome:
    """Run one case; whatever goes wrong is a failure of the case, not of the runner."""
    outcome = Outcome(Case.unreadable(folder))
    try:
        outcome.case = Case.load(folder)
        name = f"tests.parity.{outcome.case.method}"
        if importlib.util.find_spec(name) is None:
            raise Unsupported(f"no method {outcome.case.method}")
        importlib.import_module(name).run(outcome.case, outcome)
    except Unsupported as error:
        outcome.unsupported = str(error)
    except Exception as error:
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
