"""The records of a short made-up run, as the trainer makes them."""

from pathlib import Path
from typing import Any

from pcl_fast.sinks import RunInfo

INFO = RunInfo(
    title="pcl seed 0",
    run_dir=Path("runs/x"),
    epochs=3,
    steps_per_epoch=10,
    first_step=0,
    first_record=0,
    headline={"PCL": "mean_teacher1", "PCL-E": "mean_ensemble"},
)
TERMS = {"ce/peer1": 2.25, "ce/peer2": 2.35, "ce/ensemble": 2.0, "pe/peer1": 0.125, "pe/peer2": 0.25}
TERMS |= {"pm/peer1": 0.5, "pm/peer2": 0.75}


def make_record(kind: str, epoch: int, step: int, measured: bool = True) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": kind,
        "epoch": epoch,
        "step": step,
        "lr": 0.025,
        "distill_weight": 0.4321,
        "ema_coefficient": 0.9876,
        "loss": sum(TERMS.values()),
        "terms": TERMS,
        "gradient_norm": 1.5,
        "train_top1": {"peer1": 31.25, "peer2": 32.5, "ensemble": 40.0},
        "images_per_second": 12345.6,
    }
    if kind == "epoch" and measured:
        heads = {"peer1": 50.0, "peer2": 51.0, "ensemble": 55.0}
        heads |= {"mean_teacher1": 60.25 + epoch, "mean_teacher2": 61.0, "mean_ensemble": 65.75 + epoch}
        record["val"] = {
            head: {"top1": top1, "top5": 95.0, "loss": 1.0, "images": 100} for head, top1 in heads.items()
        }
    return record


def make_run(epochs: int = 3) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for epoch in range(epochs):
        records.append(make_record("step", epoch, epoch * 10 + 5))
        records.append(make_record("epoch", epoch, epoch * 10 + 10))
    return records
