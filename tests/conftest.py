import torch


torch.set_num_threads(1)  # on tensors of a few kilobytes threads only wait for each other
