"""What the paper reports: top-1 accuracy in percent, mean and standard deviation over three runs.

Wu and Gong, AAAI 2021, tables of CIFAR-10, CIFAR-100 and ImageNet. Figures that were not read in the paper
itself are not `certain`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reported:
    """A figure of the paper."""

    mean: float
    std: float | None = None
    certain: bool = True


COLUMNS = ("vanilla", "DML", "CL", "ONE", "FFL-S", "OKDDip", "KDCL", "PCL")  # as results are named here

# By network: the baseline, then each method's mean and standard deviation, in the order of COLUMNS.
_CIFAR100 = {
    "resnet32": "(71.28) 73.68 .14 72.33 .46 73.79 .41 72.18 .11 73.25 .38 73.76 .34 74.14 .16",
    "resnet110": "76.21 77.86 .50 78.83 .58 78.40 .36 77.22 .41 78.54 .26 78.28 .32 79.98 .55",
    "vgg16": "(74.32) 75.52 .10 74.33 .08 74.37 .39 70.87 .99 74.68 .05 75.67 .22 76.89 .25",
    "densenet40-12": "71.03 73.06 .31 71.45 .34 71.60 .38 71.25 .35 71.23 .14 72.52 .42 73.09 .16",
    "wrn20-8": "(78.03) 79.77 .07 79.40 .12 79.10 .39 78.22 .14 78.83 .06 79.37 .30 80.51 .49",
}
_CIFAR10 = {
    "resnet32": "(93.62) 93.94 .07 94.02 .28 94.20 .12 94.01 .11 94.17 .15 94.01 .08 94.33 .12",
    "resnet110": "94.91 94.53 .25 95.19 .11 95.16 .30 94.72 .06 95.14 .10 95.11 .16 95.53 .16",
    "vgg16": "93.96 94.13 .07 94.14 .15 94.14 .23 93.22 .08 93.98 .06 94.09 .12 94.74 .02",
    "densenet40-12": "93.19 93.59 .26 93.05 .25 93.08 .21 93.28 .16 92.64 .22 93.87 .08 94.13 .13",
    "wrn20-8": "(94.68) 95.20 .13 94.59 .08 94.70 .14 94.72 .13 94.83 .15 95.27 .16 95.42 .04",
}


def _read(line: str) -> dict[str, Reported]:
    first, *rest = line.split()
    baseline = Reported(float(first.strip("()")), certain="(" not in first)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    others = [Reported(float(mean), float(std)) for mean, std in pairs]
    return dict(zip(COLUMNS, [baseline, *others], strict=True))


TABLES: dict[str, dict[str, dict[str, Reported]]] = {
    "cifar10": {network: _read(line) for network, line in _CIFAR10.items()},
    "cifar100": {network: _read(line) for network, line in _CIFAR100.items()},
    "imagenet": {
        "r18": {"vanilla": Reported(100 - 30.49, certain=False), "PCL": Reported(100 - 29.58)},
        "r50": {},
        "rx50": {},
    },
}
"""By table and row: what the paper reports, by the names of results here."""
