import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # more is slower on networks this small
# Ctrl-C as in a terminal, here and in child processes: a suite that runs as a background job would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
