"""What the process that ranks are forked from imports, so that they need not."""

import pipelines.resident
import pipelines.torch_loader  # noqa: F401
