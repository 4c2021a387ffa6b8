import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Ctrl-C as in a terminal, here and in child processes: a suite that runs as a background job would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
