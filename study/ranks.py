"""Which of torchrun's processes this one is."""

import os

# Batch systems and pods may set RANK and WORLD_SIZE of a process that torchrun did not start.
BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if BY_TORCHRUN else 0
RANKS = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN else 1  # how many it started
