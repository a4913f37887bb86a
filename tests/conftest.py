"""Every test runs offline, on one CPU thread, without telemetry, with a cache of its own."""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

# Before any library is imported: most read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


LOOPBACK = "127.0.0.1"


class NetworkBlockedError(RuntimeError):
    """A test tried to reach the network."""


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Sockets within this machine work (AF_UNIX, multiprocessing's; servers that a test starts on 127.0.0.1); all
    others are refused, and so is every name."""
    addresses = socket.getaddrinfo

    def guarded(method):
        def call(self, address, *args):
            if self.family != getattr(socket, "AF_UNIX", None) and address[0] != LOOPBACK:
                raise NetworkBlockedError(f"tests run offline, but something connects to {address!r}")
            return method(self, address, *args)

        return call

    def no_names(host, *args, **kwargs):
        if host == LOOPBACK:
            return addresses(host, *args, **kwargs)
        raise NetworkBlockedError(f"tests run offline, but something looks up {host!r}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", no_names)
        yield


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Tiny bases that tests build are shared within one session and gone after it."""
    folder = tmp_path_factory.mktemp("steerbook_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERBOOK_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every test, in whichever order they run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def load_recipe():
    """A recipe's script as a module, by its name: `recipes/` is not a package."""
    with pytest.MonkeyPatch.context() as patch:

        @functools.cache
        def load(name):
            path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)  # its dataclasses look their annotations up there
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(scope="session")
def launch_smoke(tmp_path_factory):
    """`launch_smoke("lofit")`: its smoke preset as a user runs it; the run's folder, and what it printed."""

    def launch(name):
        folder = tmp_path_factory.mktemp(name) / "smoke"
        command = [sys.executable, "-m", "accelerate.commands.launch", f"recipes/{name}.py", "--preset", "smoke"]
        done = subprocess.run([*command, "--output_dir", str(folder)], cwd=Path(__file__).parents[1], env=os.environ,
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, done.stdout

    return launch
