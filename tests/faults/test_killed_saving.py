"""Killed at any moment of a save in the background: what has a name is complete, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Children are forked before there are threads, and only they save.
KILLS = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import torch
from safetensors import safe_open
from pcl_fast import atomic, checkpoint, saver

run, SIZE = Path(sys.argv[1]), 100_000
store = checkpoint.CheckpointStore(run)
OURS = {module.__file__ for module in (atomic, checkpoint, saver)}
problems, most = [], 0

def content(step):
    return {"progress": {"step": step}, "state": {"ramp": torch.arange(SIZE) + step}}

def saves(first, count):
    writer = saver.Saver(store, run / "model.safetensors")
    for step in range(first, first + count):
        writer.save(content(step), step, {"ramp": torch.arange(SIZE) + step}, {"steps": str(step)})
    writer.wait()

def next_step():
    return int(store.paths()[-1].stem[5:]) + 1 if store.paths() else 1

def check():
    # Every complete name is a complete file, read without the product; two stay; none older than before.
    global most
    steps = [int(path.stem[5:]) for path in store.paths()]
    for path, step in zip(store.paths(), steps):
        saved = torch.load(path, weights_only=True)
        if not torch.equal(saved["state"]["ramp"], content(step)["state"]["ramp"]):
            problems.append(f"{path} is not what was saved")
    most = max(most, len(steps))
    if len(steps) < min(2, most):
        problems.append(f"only {steps} are left")
    newest = store.load_newest(problems.append)
    if steps and newest["progress"]["step"] != steps[-1]:
        problems.append(f"{newest['progress']} loaded of {steps}")
    if steps:
        with safe_open(run / "model.safetensors", "pt") as model:
            of = int(model.metadata()["steps"])
            if of < steps[-1] or not torch.equal(model.get_tensor("ramp"), torch.arange(SIZE) + of):
                problems.append(f"the network of step {of} lies beside the checkpoint of step {steps[-1]}")
    return steps

def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

class DyingAt:
    # Kills this process when the saving thread comes to its `place`-th line; counts them in `lines`.
    def __init__(self, place=None):
        self.place, self.lines = place, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.place:
                os.kill(os.getpid(), signal.SIGKILL)
        return self

def count_lines():
    threading.settrace(tracer := DyingAt())
    saves(next_step(), 1)
    (run / "lines").write_text(str(tracer.lines))

def die_at(place):
    threading.settrace(DyingAt(place))
    saves(next_step(), 1)

def at_places(count):
    for _ in range(3):
        os.waitpid(forked(count_lines), 0)  # the third as all that follow: two lie there already
    lines = int((run / "lines").read_text())
    places = sorted(random.Random(1).sample(range(1, lines + 1), min(count, lines)))
    for place in places:
        before = check()
        _, status = os.waitpid(forked(lambda: die_at(place)), 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            problems.append(f"not killed at line {place} of {lines}")
        if check()[-1] - before[-1] not in (0, 1):
            problems.append(f"{before} became {check()}")
        leftovers()
    return len(places)

def leftovers():
    found = [*run.glob(".*.part"), *store.folder.glob(".*.part")]
    atomic.remove_leftovers(run)
    atomic.remove_leftovers(store.folder)
    return len(found)

def at_moments(count):
    draws, inside, deadline = random.Random(2), 0, time.monotonic() + 40
    while inside < count and time.monotonic() < deadline:
        child = forked(lambda: saves(next_step(), 10**6))
        time.sleep(draws.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check()
        inside += leftovers() > 0
    return inside

report = {"places": at_places(20), "moments": at_moments(10)}
os.waitpid(forked(lambda: saves(next_step(), 1)), 0)
print(json.dumps(report | {"problems": problems, "saved": len(check())}))
"""


@pytest.mark.timeout(110)
def test_killed_at_twenty_places_and_ten_moments_inside_a_save(tmp_path: Path) -> None:
    """Between two lines of the code that saves, and wherever a clock says: also in the middle of a write."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == {"places": 20, "moments": 10, "problems": [], "saved": 2}
