"""The example of distributed training, by the command that its documentation gives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import of_no_kernel

of_no_kernel()
for package in ("rich", "sklearn", "matplotlib"):
    pytest.importorskip(package)

from perf import digits

ROOT = Path(digits.__file__).parent.parent


def test_two_processes_have_the_curve_of_one():
    command = re.search(r"^ +torchrun (.*)", digits.__doc__, re.MULTILINE).group(1).split()
    for document in ("README.md", "perf/README.md"):
        assert " ".join(command) in (ROOT / document).read_text()
    # torchrun waits for ever where the host's own name has no address, as in some containers.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "localhost"]
    done = subprocess.run(
        [*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    curves = [list(map(float, line.split()[1:])) for line in lines[1 : 1 + digits.EPOCHS]]
    # float64, whose roundings steps of gradient descent may make grow
    assert all(two == pytest.approx(one, rel=1e-9) for two, one in curves)
    assert curves[-1][0] < curves[0][0] / 2
    assert lines[-1].startswith("largest difference")
