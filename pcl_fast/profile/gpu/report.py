"""A GPU's measurements as a section of a page, in markdown; the rest of the page is left alone."""

from collections.abc import Iterator
from pathlib import Path

from pcl_fast import atomic
from pcl_fast.errors import DataError
from pcl_fast.profile.gpu import tables
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.goals import goal_table

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
USAGE = (
    "To measure again: `make gpu` on a machine with a GPU, up to 8 minutes; `pcl-fast profile gpu --help` "
    "tells of single parts; `pcl-fast profile gpu --rehearse` runs everything, tiny, without a GPU."
)


def write_section(page: Path, found: Found) -> None:
    """Put the section into a page in the place of an older one, or at its end; the page is made if need be.

    DataError if only one of the two marks is there, or not in order.
    """
    text = page.read_text() if page.exists() else ""
    section = f"{BEGIN}\n{render(found)}\n{END}"
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 and end < 0:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    elif 0 <= begin < end:
        text = text[:begin] + section + text[end + len(END) :]
    else:
        raise DataError(f"{page}: needs {BEGIN} and, behind it, {END}; or neither")
    atomic.write_text(page, text)


def render(found: Found) -> str:
    """All tables that have rows, each with its heading; then what failed or was not run."""
    return "\n\n".join(["## GPU", *_head(found), *_tables(found), _parts(found)])


def _head(found: Found) -> Iterator[str]:
    if any("--rehearse" in part["command"] for part in found.parts.values()):
        yield "**A rehearsal, at tiny sizes and without a GPU: no figure here means anything.**"
    machine = found.row("machine")
    if machine is not None:
        names = ("driver", "python", "torch", "cuda", "cudnn", "triton", "cpu")
        words = [machine["gpu"], *(f"{name} {machine[name]}" for name in names)]
        clocks = found.row("clocks") or {}
        told = {"clock": "clocks.sm", "of": "clocks.max.sm", "memory": "clocks.mem"}
        under_load = [f"{word} {clocks[key]}" for word, key in told.items() if key in clocks]
        yield ", ".join([*words, *under_load]) + "."
    runs = dict.fromkeys(
        (part["date"][:10], part["commit"], part["command"]) for part in found.parts.values()
    )
    for date, commit, command in runs:
        yield f"{date}, commit {commit}, `{command}`; every sample in `measurements/{FILE}`."
    yield (
        "Times are by the device's clock, after a warm-up: medians of ten samples or more, in brackets the "
        "least and the most. Kernels are timed in CUDA graphs, on inputs in turn that no cache holds "
        "together; steps on one batch of noise, CIFAR-100's and ImageNet's recipes, bfloat16, channels-last."
    )
    yield USAGE


def _tables(found: Found) -> Iterator[str]:
    tests = [[row["name"], row["summary"]] for row in found.rows("tests")]
    sections = {
        "Goals": goal_table(found),
        "Tests": tables.table(["run", "result"], tests),
        "The device": tables.device_table(found),
        "Steps": tables.step_table(found),
        "Kernels and launches of a step": tables.count_table(found),
        "Updates: SGD, averages and bfloat16 copies": tables.update_table(found),
        "The update within a step": tables.share_table(found),
        "PCL's losses with their gradients": tables.loss_table(found),
        "BatchNorm, residual and ReLU": tables.norm_table(found),
        "Views": tables.view_table(found),
        "Seeds side by side": tables.choice_table(found, "seeds"),
        "Choices": tables.choice_table(found, "choice"),
    }
    for title, body in sections.items():
        if body:
            yield f"### {title}\n\n{body}"


def _parts(found: Found) -> str:
    ended = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in found.parts.items())
    broken = [f"{row['name']}: {line}" for row in found.rows("tests") for line in row["broken"]]
    troubles = [*found.troubles(), *broken]
    listed = "\n".join(f"- {line}" for line in troubles) if troubles else "Nothing."
    return f"### Failed or not run\n\n{listed}\n\nTime that the parts took: {ended}."
