"""Replay recorded reference values: `python -m tests.golden_replay DIR --json`.

Prints one line a case and a last line with totals; exits 1 if any case fails. Cases are told by the `kind` in their
JSON, so any directory of the format (other sizes, other seeds) can be replayed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import torch

import tests.golden
from tests.golden.registry import CHECKS, Case, CheckResult


def find_cases(folder: Path) -> list[Path]:
    """JSON files of the cases in `folder`, sorted; entries of kind `weights` are not cases."""
    paths = sorted(folder.glob("*.json"))
    return [path for path in paths if json.loads(path.read_text(encoding="utf-8")).get("kind") != "weights"]


def load_checks() -> None:
    """Import every module of `tests.golden`, which registers its checks."""
    for module in pkgutil.iter_modules(tests.golden.__path__):
        importlib.import_module(f"tests.golden.{module.name}")


def replay(json_path: Path) -> CheckResult:
    """Run one case. A crash or an unknown kind is a failure of the case, with the reason."""
    case = Case.read(json_path)
    result = CheckResult(*case.tolerance)
    run = CHECKS.get(case.meta["kind"])
    if run is None:
        result.problems.append(f"no check for kind {case.meta['kind']!r}")
        return result
    try:
        with torch.inference_mode():
            run(case, result)
    except Exception as error:  # one broken case must not hide the others
        result.problems.append(f"{type(error).__name__}: {error}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    load_checks()
    paths = find_cases(arguments.folder)
    if not paths:
        parser.error(f"no cases in {arguments.folder}")
    failed = 0
    for path in paths:
        result = replay(path)
        failed += not result.ok
        line = {
            "case": path.stem,
            "ok": result.ok,
            "max_abs_err": result.max_abs_err if result.max_abs_err != float("inf") else None,
            "tolerance": {"atol": result.atol, "rtol": result.rtol},
        }
        if result.problems:
            line["problems"] = result.problems[:5]
        print(
            json.dumps(line) if arguments.json else f"{'ok  ' if result.ok else 'FAIL'} {path.stem} {result.problems}"
        )
    totals = {"cases": len(paths), "passed": len(paths) - failed, "failed": failed}
    print(json.dumps(totals) if arguments.json else totals, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
