"""Before any import of what reads them: no progress bars, and no hub."""

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
