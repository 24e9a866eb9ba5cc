"""The studies of docs/results, one script each."""

import utils  # noqa: F401  # before torch is imported: it says how torch's threads wait
