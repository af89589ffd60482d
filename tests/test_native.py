"""C++ kernels are compiled once, kept, and done without where there is no compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

from pcl_fast import native

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pcl_fast"


def a_source(folder: Path, text: str = SOURCE) -> Path:
    folder.mkdir(exist_ok=True)
    source = folder / "answer.cpp"
    source.write_text(text)
    return source


def test_a_library_is_named_for_all_it_depends_on(tmp_path: Path, cache: Path) -> None:
    source = a_source(tmp_path / "source")
    path = native.library_path(source)
    assert path.parent == cache
    assert native.library_path(source) == path
    (source.parent / "shared.h").write_text("// a header")
    with_header = native.library_path(source)
    source.write_text(SOURCE + "//")
    assert len({path, with_header, native.library_path(source)}) == 3


def test_it_is_put_in_place_whole(tmp_path: Path, cache: Path) -> None:
    import ctypes

    source = a_source(tmp_path / "source")
    library = native.library_path(source)
    native.compile_library(source, library)
    assert list(cache.iterdir()) == [library]
    assert ctypes.CDLL(str(library)).answer() == 42


def test_what_does_not_compile_leaves_nothing_and_says_why(tmp_path: Path, cache: Path) -> None:
    source = a_source(tmp_path / "source", "int answer( {")
    with pytest.raises(native.KernelUnavailableError, match=r"failed on answer\.cpp: .*error"):
        native.compile_library(source, cache / "answer.so")
    assert list(cache.iterdir()) == []


def test_without_a_compiler_torch_does_it_and_says_so(tmp_path: Path) -> None:
    script = (
        "from pcl_fast import native\n"
        "from pcl_fast.kernels import norm_act\n"
        "import torch\n"
        "x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)\n"
        "print(norm_act.takes(x, torch.ones(16), None), native.why_unavailable(norm_act.SOURCE))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert found.stdout == "False no C++ compiler (c++, g++, clang++ not found)\n"


def test_the_compiler_asked_for_is_the_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.KernelUnavailableError, match="no-such-compiler not found"):
        native.compiler()
