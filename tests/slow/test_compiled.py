"""A compiled run that is interrupted and resumed is the uninterrupted one: minutes, for each process compiles anew."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "iql": "--iterations 3000 --eval-every 500 --eval-episodes 20 --final-episodes 20 --hidden 32 --batch-size 32",
    "iql online": "--iterations 1000 --online-steps 2000 --eval-every 500 --eval-episodes 20 --final-episodes 20 "
    "--hidden 32 --batch-size 32",
    "pspo": "--iterations 3000 --eval-every 500 --eval-episodes 20 --final-episodes 20 --hidden 16 --batch-size 32 "
    "--dynamics-hidden 16 --pool-size 3 --active-models 3 --dynamics-epochs 1 --bc-updates 50",
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", RUNS)
def test_a_compiled_run_goes_on_to_the_same_bits(name, tmp_path):
    script = name.split()[0]
    command = [sys.executable, ROOT / f"{script}.py", *RUNS[name].split(), "--dataset-episodes", "200", "--no-cuda"]
    command += ["--compile", "on", "--num-threads", "1"]
    subprocess.run([*command, "--runs-dir", tmp_path / "whole"], check=True, capture_output=True)
    stopped = subprocess.Popen(
        [*command, "--runs-dir", tmp_path / "stopped"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while stopped.poll() is None:
        time.sleep(0.05)
        metrics = list((tmp_path / "stopped").glob("*/metrics.csv"))
        if metrics and len(metrics[0].read_text().splitlines()) >= 5:
            break
    stopped.send_signal(signal.SIGINT)
    stopped.communicate()
    assert stopped.returncode == 130
    (run,) = (tmp_path / "stopped").iterdir()
    assert not (run / "result.json").exists()
    subprocess.run([sys.executable, ROOT / f"{script}.py", "--resume", run], check=True, capture_output=True)
    (whole,) = (tmp_path / "whole").iterdir()
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
