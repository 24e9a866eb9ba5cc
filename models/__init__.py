"""What is frozen: generators, classifiers, and how they are opened and checked."""

import warnings

# diffusers 0.36 says so when it is imported without a GPU
warnings.filterwarnings(
    "ignore", message="User provided device_type of 'cuda', but CUDA is not available"
)
