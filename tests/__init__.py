"""Tests run without a network; the variable is read when huggingface_hub is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
