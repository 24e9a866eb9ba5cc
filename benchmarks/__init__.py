"""Measurements, each made in a forked process.

CUDA must not be asked for before, as importing diffusers would.
"""

import os

import utils  # noqa: F401  # before torch is imported: it says how torch's threads wait

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # ask the driver's library instead
