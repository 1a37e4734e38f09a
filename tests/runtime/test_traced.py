import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("traced.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways", [["export", "dynamic"], ["eager", "aot_eager"], ["inductor"]], ids=["export", "traced", "inductor"]
)
def test_packed_models_are_traced_whole(ways):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *ways], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * len(ways)
