"""One thread for all model tests: on tiny tensors, threads that wait for each other cost more than the arithmetic."""

import torch

torch.set_num_threads(1)
