"""The wheel: jaxfed alone, and it runs outside the checkout."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_jaxfed_alone_and_runs_elsewhere(tmp_path, users_environment):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"jaxfed"}
    assert "jaxfed/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    environment = users_environment | {"PYTHONPATH": str(site)}
    where = "import jaxfed; print(jaxfed.__file__)"
    train = ["-m", "jaxfed.train", "--rounds", "1", "--model.name", "logistic"]
    for arguments, expected in ((["-c", where], str(site)), (train, "round 1")):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert expected in done.stdout


def test_everything_imported_is_declared():
    """A module from outside is in the dependencies, or in the extra that its loader names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {"tensorflow_datasets", "tensorboardX", "h5py"}
    names = {"sklearn": "scikit-learn"}
    declared = {re.split(r"[>=<\[;]", line)[0] for line in project["dependencies"]}
    for path in (ROOT / "jaxfed").rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "jaxfed").split(".")[0])
        for module in found - set(sys.stdlib_module_names) - optional - {"jaxfed"}:
            assert names.get(module, module) in declared, (path.name, module)


ORDER = [
    "config", "distributed", "data", "plan", "core", "models", "own", "optimizers", "aggregators",
    "algorithms", "tasks", "resolve", "folder", "saved", "initial", "machine", "precision",
    "pieces", "prepare", "program", "segments", "final", "run", "checkpoint", "report", "screen",
    "manual", "tensorboard", "resume", "train",
]  # fmt: skip
"""A file never imports one to its right."""


def imported(path: Path) -> set[str]:
    """The parts of jaxfed that a file imports, by whatever form of import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxfed":
            names = [f"jaxfed.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("jaxfed.")}
    return found


def backward(path: Path, root: Path) -> set[str]:
    inside = path.relative_to(root).with_suffix("").parts[0]
    return {other for other in imported(path) if ORDER.index(other) > ORDER.index(inside)}


def test_imports_point_one_way():
    root = ROOT / "jaxfed"
    for path in root.rglob("*.py"):
        if path != root / "__init__.py":
            assert not backward(path, root), path.name
    for path in (root / "data").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) jax\b", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize(
    "line", ["from jaxfed import report", "import jaxfed.report", "from jaxfed.report import page"]
)
def test_a_planted_back_edge_is_seen(line, tmp_path):
    (tmp_path / "plan.py").write_text(f"{line}\n")
    assert backward(tmp_path / "plan.py", tmp_path) == {"report"}
