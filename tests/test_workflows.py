"""The workflows of GitHub Actions: valid, modest in what they may do, and calling targets that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)


def steps(path: Path) -> list[dict]:
    """All steps of all jobs."""
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def test_schema():
    """GitHub's own schema accepts them."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@each
def test_targets_exist(path):
    """Each `make` that a workflow calls has a rule."""
    called = [target for step in steps(path) for target in re.findall(r"(?:^|[;&\n]\s*)make ([\w-]+)", step.get("run", ""))]
    assert set(called) <= TARGETS


@each
def test_pinned_and_modest(path):
    """Actions are pinned to a major version; nothing may write unless its job says so; runs do not pile up or hang."""
    workflow = yaml.safe_load(path.read_text())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(path) if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


def test_same_parts_as_ci_run():
    """ci.yml runs what .ci/run runs."""
    (ci,) = [p for p in WORKFLOWS if p.stem == "ci"]
    local = re.findall(r"\bmake ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert local and [s["run"] for s in steps(ci) if "run" in s] == [f"make {target}" for target in local]


@each
def test_scripts_parse(path):
    """The shell accepts each script."""
    for step in steps(path):
        if "run" in step:
            script = re.sub(r"\$\{\{.*?\}\}", "expression", step["run"])
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
