"""Tests run without a network, and on one thread, on which tiny models are fastest; libraries read
it at import.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
