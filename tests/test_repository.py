"""The house rules that no linter knows."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("pcl_fast", "pipelines", "datasets_prep")
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

# Written so that no pattern matches itself.
FORBIDDEN = {
    "a path of somebody's home": r"/(?:home|Users)/(?!someone\b|user\b|you\b)[a-z]",
    "a path of somebody's home or workspace": r"(?<![\w.~}])/(?:root|work|workspace)/[\w.]",
    "a local or private package index": r"(?:find-links|index-url)\s*[= ]\s*\S",
    "unfinished work": r"\b(?:TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b",
    "a conflict left in": r"^(?:<{7}|>{7}) ",
}

SIDE_EFFECTS = """
import importlib, pkgutil, sys, threading
sys.path.insert(0, {repository!r})
import numpy, random, rich.console, torch  # rich draws a random number itself
before = (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
settings = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                    torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                    torch.get_float32_matmul_precision(), torch.multiprocessing.get_start_method(True))
settings_before = settings()
for package in {packages!r}:
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] not in ("ffcv", "nvidia", "timm", "wandb", "tensorboard"):
                raise
assert settings() == settings_before, "a global setting of torch changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not torch.distributed.is_initialized(), "a process group was made"
assert threading.active_count() == 1, threading.enumerate()
after = (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
assert after == before, "random numbers were drawn"
"""


def project_files() -> list[Path]:
    """Every file git tracks or would add."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    files = [REPOSITORY / name for name in listing.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def test_no_file_is_large() -> None:
    sizes = {str(path.relative_to(REPOSITORY)): path.stat().st_size for path in project_files()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}


def test_nothing_forbidden_is_written_anywhere() -> None:
    found: list[str] = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for meaning, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text, re.MULTILINE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(REPOSITORY)}:{line}: {meaning}: {match.group()!r}")
    assert found == []


def test_every_module_says_what_it_is() -> None:
    assert MODULES
    silent = [
        str(path.relative_to(REPOSITORY))
        for path in MODULES
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_file_fits_its_idea() -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 250} == {}


def test_every_function_fits_a_screen() -> None:
    long: list[str] = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = lines_of_code(node)
                if length > 40:
                    long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {length} lines")
    assert long == []


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None and first.end_lineno:
        length -= first.end_lineno - first.lineno + 1
    return length


@pytest.mark.timeout(180)  # every module and its libraries, from cold, on a busy machine
def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    home, work, temporary = (tmp_path / name for name in ("home", "work", "temporary"))
    for folder in (home, work, temporary):
        folder.mkdir()
    script = SIDE_EFFECTS.format(repository=str(REPOSITORY), packages=PACKAGES)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert written == []


def test_every_room_has_its_floor() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    placed = set(re.findall(r"pcl_fast\.(\w+)", " ".join(layers)))
    children = [path for path in (REPOSITORY / "pcl_fast").iterdir() if path.name != "__init__.py"]
    rooms = {path.stem for path in children if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - placed == set(), "add it to the layers in pyproject.toml"


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    loose = [str(pin) for pin in pins if pin.url or not re.fullmatch(r"==[\w.!]+", str(pin.specifier))]
    assert loose == []
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    for requirement in map(Requirement, asked):
        version = versions.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} forbids its pin {version}"


@pytest.mark.parametrize("command", ["script", "module"])
def test_the_command_line_answers(command: str) -> None:
    run = [sys.executable, "-m", "pcl_fast"]
    if command == "script":
        script = Path(sys.executable).parent / "pcl-fast"
        if not script.exists():
            pytest.skip("pcl-fast is not installed in this environment: make setup")
        run = [str(script)]
    done = subprocess.run([*run, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_installed_version_is_this_one() -> None:
    try:
        installed = importlib.metadata.version("pcl-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pcl-fast is not installed in this environment: make setup")
    assert installed == PROJECT["project"]["version"]
