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
    optional = {"tensorflow_datasets", "tensorboardX"}
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


def test_imports_point_one_way():
    """A file never imports one to its right, and the data layer never imports JAX."""
    order = [
        "experiment", "distributed", "model", "models", "data", "machine", "optimizers", "plan",
        "client", "aggregate", "batch_stats", "algorithm", "evaluate", "prepare", "program",
        "segments", "final", "run", "sweep", "folder", "checkpoint", "saved", "report", "screen",
        "manual", "tensorboard", "resume", "train",
    ]  # fmt: skip
    for path in (ROOT / "jaxfed").rglob("*.py"):
        inside = path.relative_to(ROOT / "jaxfed").with_suffix("").parts[0]
        text = path.read_text()
        if inside == "data":
            assert not re.search(r"^\s*(import|from) jax\b", text, re.MULTILINE), path.name
        if inside == "__init__":
            continue
        for found in re.findall(r"^from jaxfed\.(\w+)", text, re.MULTILINE):
            assert order.index(found) <= order.index(inside), (inside, found)
