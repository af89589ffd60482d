"""What the process that ranks are forked from imports, so that they need not."""

import importlib

for name in (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torchvision.transforms.v2",
    "tyro",
    "pcl_fast.commands.train",
    "pipelines.resident",
    "pipelines.torch_loader",
):
    importlib.import_module(name)
