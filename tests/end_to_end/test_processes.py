"""Two processes give the update that one gives, with the same batch over all of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainers import metrics

HERE = Path(__file__).parent
# Those of this process too, so that a checkout beside an installed one is tested by its own source.
PATHS = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
NAMES = (
    "plain",
    "whitened",
    "minibatches",
    "whitened minibatches",
    "rows",
    "macro ratio in small micro-batches",
    "attention and scaled scores",
    "attention of the policy",
    "attention of the policy, minibatches",
    "groups",
    "reward to go",
    "whitened groups",
    "gradient checkpointing",
    "adapters",
    "stopped and resumed",
)


def train(folder: Path, processes: int) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [str(HERE / "several_processes.py"), str(folder)]
    options = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    launched = ["-m", "torch.distributed.run", *options] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, *launched, *script], capture_output=True, text=True, timeout=400, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_two_processes_give_the_parameters_and_metrics_of_one(tmp_path: Path) -> None:
    # One test for all runs: to start the processes takes longer than what they do.
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert sorted(path.name for path in two.iterdir()) == sorted(NAMES)
    for name in NAMES:
        ours, theirs = (load_file(folder / name / "learned.safetensors") for folder in (one, two))
        assert ours.keys() == theirs.keys()
        for key in ours:
            gap = float((theirs[key] - ours[key]).abs().max())
            assert gap <= 1e-5, (name, key, gap)
        lines = [metrics(folder / name) for folder in (one, two)]
        assert len(lines[0]) == len(lines[1]) == 4
        for x, y in zip(*lines, strict=True):
            for record in (x, y):
                record.pop("policy/sampler_gap", None)  # rounding alone
            assert y == pytest.approx(x, abs=2e-4, rel=2e-4), name


REFUSED = {
    "batch_size=3": "batch_size is 3, not a multiple of the 2 processes",
    "batch_size=12, credit=CreditConfig(advantage=RLOO(group_size=4))": (
        "would have 6, not a multiple of the 4 responses of a group; choose a multiple of 8"
    ),
}
ODD = """
from pathlib import Path
from trainers import trainer
from apportion import *
try:
    trainer(Path('x'), {})
except ValueError as error:
    print('refused:', error)
"""


@pytest.mark.slow
def test_batches_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    # One test for all, as above.
    (tmp_path / "odd.py").write_text("".join(ODD.replace("{}", settings) for settings in REFUSED))
    environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "odd.py"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=environment, cwd=tmp_path
    )
    assert result.stdout.count("refused:") == 2 * len(REFUSED), result
    assert all(message in result.stdout for message in REFUSED.values()), result
    assert not (tmp_path / "x").exists()
