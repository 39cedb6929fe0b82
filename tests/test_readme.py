"""The README says what is there: files, commands, recipes, numbers."""

import importlib
import json
import re
import subprocess
from pathlib import Path

from launch import ROOT

from softcot_ds.cli import COMMANDS

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "word_problems.json"


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.splitlines())


def test_file_tree_is_the_one_on_disk():
    tree = README.split("## Where things live")[1].split("```")[1]
    top, package, inside = set(), set(), False
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        if line.startswith("  "):
            assert inside, line
            package.add(name.rstrip("/"))
        else:
            top.add(name.rstrip("/"))
            inside = name == "softcot_ds/"
    on_disk = {path.split("/")[0] for path in tracked() if not path.startswith(".")} - {"README.md"}
    assert top == on_disk
    in_package = {path.split("/")[1] for path in tracked() if path.startswith("softcot_ds/")} - {"__init__.py"}
    assert package == in_package


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_recipe_is_listed():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.name}`" in README


def test_commands_and_make_targets_exist():
    commands = set(re.findall(r"softcot-ds ([\w-]+)", README)) | set(re.findall(r"--module softcot_ds\.(\w+)", README))
    assert commands <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_numbers_are_those_of_the_committed_results():
    results = json.loads(RESULTS.read_text())
    block = README.split("<!-- results:")[1].split("<!-- end of results -->")[0]
    rows = {cells[1].strip(" `"): cells for line in block.splitlines() if len(cells := line.split("|")) == 7}
    for name, accuracy in results["accuracy"].items():
        cells = [cell.strip() for cell in rows[name]]
        assert cells[2] == f"{100 * accuracy['mean']:.1f}%", name
        assert cells[3] == f"{100 * accuracy['min']:.1f}% to {100 * accuracy['max']:.1f}%", name
        if name != "learned":
            assert cells[4] == f"{100 * results['smallest_lead'][name]:+.1f}", name
    assert len(results["seeds"]) >= 5
    for name in ("shuffled", "mean", "zero", "none"):
        assert results["smallest_lead"][name] >= 0.05
    assert all(report["num_problems"] >= 1000 for report in results["reports"])


def test_families_are_those_of_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    step = {row["family"]: row["step"] for row in results["families"]}
    block = README.split("<!-- families:")[1].split("<!-- end of families -->")[0]
    rows = [cells for line in block.splitlines() if len(cells := line.split("|")) == 5][2:]
    assert len(rows) == len(results["counts"])
    for _, name, number, families, _ in rows:
        kind = name.strip().split(" step")[0]
        assert int(number) == results["counts"][kind] == list(step.values()).count(kind)
        assert {step[family] for family in re.findall("`(.+?)`", families)} == {kind}
    assert str(len(step)) in README.split("<!-- families:")[0]
    for row in results["families"]:
        if row["step"] in ("fast", "full"):
            assert row["loss_error"] < 1e-6, row["family"]
            assert row["gradient_error"] < 5e-4, row["family"]
            assert row["assistant"] == "fit", row["family"]


def test_page_of_families_is_that_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    families = importlib.import_module("families")
    assert (ROOT / "docs" / "models.md").read_text() == families.page(json.loads(families.RESULT.read_text()))


def test_no_result_names_a_path_of_a_machine():
    for path in Path(ROOT / "benchmarks" / "results").glob("*.json"):
        assert str(Path.home()) not in path.read_text()
        assert str(ROOT) not in path.read_text()
