import torch

torch.set_num_threads(1)  # the models are so small that threads only wait for one another
