"""Mathematics on tensors and arrays: no model, no path, no label."""

import numba
import torch

# Numba's threads, when they are first asked for, tell torch's pool to have as many as there are
# cores. That is done here and undone, since a product's last bits depend on the number of threads.
_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_threads)
numba.set_num_threads(min(_threads, numba.get_num_threads()))
