"""The command line starts at once: nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "torchgeo", "timm", "lightning", "peft", "kornia", "pandas", "geopandas", "rasterio",
         "sklearn", "skimage", "matplotlib", "numpy")  # fmt: skip


def _imported(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "code",
    [
        "import geoexplora",
        "import geoexplora.cli.main, geoexplora.registry, geoexplora.bands",
        "from geoexplora.cli.main import main; main(['--help'])",
        "from geoexplora.cli.main import main; main(['pretrain', '--help'])",
        "from geoexplora.cli.main import main; main(['probe', '--help'])",
        "from geoexplora.cli.main import main; main(['recipes', 'list'])",
        "from geoexplora.cli.main import main; main(['pretrain', '--dataset', 'fmow-sentinel', '--print-config'])",
        "from geoexplora.cli.main import main; main(['pretrain', '--resume', 'nowhere'])",
        "from geoexplora.cli.main import main; main(['inspect', 'nowhere'])",
        "from geoexplora.cli.main import main; main(['export', './nowhere', '--format', 'timm', '--output', 'a'])",
    ],
)
def test_nothing_heavy_is_imported(code):
    assert not _imported(code) & set(HEAVY)


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"]])
def test_help_costs_little(words):
    """CPU seconds rather than the clock, so that a busy machine does not fail it; the best of three."""
    costs = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "geoexplora", *words], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        costs.append(usage.ru_utime + usage.ru_stime)
    assert min(costs) < (0.3 if words == ["--help"] else 0.6)
