"""Everything a run can be told, validated at once.

Each field is a flag of `pcl-fast train`: `Config.optim.lr` is `--optim.lr`. What is wrong is said with
the flag, the value and the fix. Fields whose value in the paper is inferred or unknown say so.
"""

from pcl_fast.config.data import (
    IMAGE_SIZES,
    NUM_CLASSES,
    TEST_IMAGES,
    TRAIN_IMAGES,
    Backend,
    DataConfig,
    DatasetName,
)
from pcl_fast.config.pcl import MAX_PEERS, PclConfig
from pcl_fast.config.rivals import (
    ClConfig,
    DmlConfig,
    FflConfig,
    KdclConfig,
    KdConfig,
    OkddipConfig,
    OneConfig,
)
from pcl_fast.config.run import Config
from pcl_fast.config.training import AmpConfig, DistConfig, OptimConfig, TrainConfig

__all__ = [
    "IMAGE_SIZES",
    "MAX_PEERS",
    "NUM_CLASSES",
    "TEST_IMAGES",
    "TRAIN_IMAGES",
    "AmpConfig",
    "Backend",
    "ClConfig",
    "Config",
    "DataConfig",
    "DatasetName",
    "DistConfig",
    "DmlConfig",
    "FflConfig",
    "KdConfig",
    "KdclConfig",
    "OkddipConfig",
    "OneConfig",
    "OptimConfig",
    "PclConfig",
    "TrainConfig",
]
