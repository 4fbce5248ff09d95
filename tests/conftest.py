"""One thread for every test: the networks are so small that threads would only wait for each other."""

import torch

torch.set_num_threads(1)
