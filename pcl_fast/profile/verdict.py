"""What binds a loader: where its processor time goes, and whether it is processor time that it lacks."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from pcl_fast.profile.loading import DECODE_ALONE, Contender

# Parts of the cores: that many idle ones would have made it faster; that many used by others are told.
IDLE, OTHERS = 0.25, 0.1


@dataclass(frozen=True, slots=True)
class Shares:
    """What an image's processor time goes into, parts of 1.

    `hand_over` is what neither decoding nor views explain.
    """

    decode: float
    views: float
    hand_over: float


def shares(contenders: Mapping[int, Contender]) -> Shares:
    """Shares at the most views, of one loader's contenders by their views, DECODE_ALONE among them.

    A view costs what one more view adds. With a single number of views, what hands over is among views.
    """
    seconds = {views: contender.cpu for views, contender in contenders.items()}
    once = seconds.pop(DECODE_ALONE)
    most = max(seconds)
    decodes = contenders[most].decodes
    rest = max(0.0, seconds[most] - decodes * once)
    views = rest
    if len(seconds) > 1:
        a_view = _slope(seconds) - (once if decodes > 1 else 0.0)
        views = min(rest, max(0.0, most * a_view))
    total = decodes * once + rest
    return Shares(decodes * once / total, views / total, (rest - views) / total)


def verdict(contenders: Mapping[int, Contender], available: int) -> str:
    """What binds one loader at the most views, in a line; `available` cores were there for it."""
    most = contenders[max(contenders)]
    parts, idle = shares(contenders), min(most.idle, max(0.0, available - most.cores))
    named = {"decoding": parts.decode, "making views": parts.views, "handing over": parts.hand_over}
    told = ", ".join(f"{name} {share:.0%}" for name, share in named.items())
    others = available - most.cores - idle
    used = f"{most.cores:.1f} of {available} cores busy"
    used += f" ({others:.1f} with other programs)" if others > OTHERS * available else ""
    if idle > IDLE * available:
        return f"{used}: not the processor but waiting binds, for disk, device or each other ({told})"
    return f"{used}: {max(named, key=lambda name: named[name])} binds ({told})"


def _slope(seconds: Mapping[int, float]) -> float:
    """Least squares: seconds that one more view adds."""
    return statistics.linear_regression(list(seconds), list(seconds.values())).slope
