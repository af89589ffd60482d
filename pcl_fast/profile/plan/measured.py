"""The time of a step on one GPU, and what is known of where it was measured."""

from dataclasses import dataclass

from pcl_fast.profile.plan.basis import Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step on one GPU, data at hand; `memory` in bytes, if that was measured, too."""

    seconds: float
    basis: Basis
    memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """What a file says of our fastest variant, and on which GPU, by torch's name of it."""

    time: StepTime
    device: str
