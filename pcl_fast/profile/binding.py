"""What binds training, from three rates: with its data, on made-up data, and of the data alone."""

from dataclasses import dataclass

WAITING = 0.05  # a share of the time that the device may wait before more than computing binds
HEADROOM = 1.1  # data this many times as fast as training are no more than just fast enough
REACHED = 0.9  # training at this share of the data's own rate goes as fast as they come


@dataclass(frozen=True, slots=True)
class Rates:
    """Images a second: `end_to_end`, as trained; `compute`, on synthetic data; `data`, loaded only."""

    end_to_end: float
    compute: float
    data: float

    @property
    def waiting(self) -> float:
        """The share of the time in which the device does not compute; 0 where noise says less than none."""
        return max(0.0, 1 - self.end_to_end / self.compute)

    @property
    def headroom(self) -> float:
        """How many times as fast as the device can compute the data could come."""
        return self.data / self.compute


def binding(rates: Rates, device: str) -> str:
    """What binds, in a line; `device` is what computes, as `GPU`."""
    waits = f"the {device} waits for data {_percent(rates.waiting)} of the time"
    alone, data = rates.compute / rates.end_to_end, rates.data / rates.end_to_end
    if rates.waiting <= WAITING:
        if rates.headroom >= HEADROOM:
            return f"compute-bound: {waits}; data could go {rates.headroom:.1f}x faster"
        return f"balanced: {waits}; data go {rates.headroom:.2f}x as fast as it computes and bind next"
    if rates.data < rates.compute and rates.end_to_end >= REACHED * rates.data:
        return f"data-bound: {waits}; with data that keep up it could train {alone:.1f}x faster"
    return (
        f"bound by what training and loading share (cores, memory, the bus): the {device} waits "
        f"{_percent(rates.waiting)} of the time; "
        f"alone, training goes {alone:.1f}x and data {data:.1f}x as fast"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
