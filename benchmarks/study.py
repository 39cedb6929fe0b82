"""What a study found, as a committed result: its cells, means and comparisons, with hardware and versions.

    softcot-ds study studies/embedded_pair.yaml seeds=0..4
    python benchmarks/study.py runs/study/study.json --out benchmarks/results/study_embedded_pair.json

The last line is a JSON object.
"""

import argparse
import json
from pathlib import Path

from environment import describe, write_result

_OF_A_RUN = ("report", "run", "adapter", "train")
"""Of a cell: where it lies on the machine that made it, and its curve."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's study.json")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    found = json.loads(args.study.read_text())
    cells = [{key: value for key, value in cell.items() if key not in _OF_A_RUN} for cell in found.pop("cells")]
    write_result({"benchmark": "study", **describe(), **found, "cells": cells}, args.out)


if __name__ == "__main__":
    main()
