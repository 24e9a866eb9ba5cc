"""Measurements. Each is made in a forked process, and CUDA must not be asked for before (importing diffusers would)."""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # ask the driver's library instead
