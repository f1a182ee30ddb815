"""What tests share: a tiny network, a run that takes a second, and the check of a mistake."""

import functools
import os
import tempfile

import pytest

import tiny


# On tensors of a few kilobytes threads only wait for each other: here, and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# diffusers copies the code of checkpoints into one folder, where two processes would overwrite each other's.
_copied_code = tempfile.TemporaryDirectory(prefix="hf-modules-")
os.environ["HF_MODULES_CACHE"] = _copied_code.name


@pytest.fixture(scope="session", autouse=True)
def quick_disk():
    """Waits for no disk, as no test cuts the power, and reads the embedded digits from their file once."""
    from sklearn import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(datasets, "load_digits", functools.cache(datasets.load_digits))
        yield


@pytest.fixture(scope="session")
def tiny_unet():
    """Builds a network of 8x8 gray images whose outputs are not zero: a fresh one's are, and any two would draw alike."""
    import torch  # which reads the number of threads when it is imported

    from tiny_diffusers import TinyUNet2DModel

    def build(attention=("none", "full"), **options):
        torch.manual_seed(0)
        options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)} | options
        unet = TinyUNet2DModel(layers_per_block=1, norm_num_groups=4, attention=attention, **options)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return unet

    return build


def _trainer(module, folder):
    own_script, own_network = (getattr(module, name, None) for name in ("SCRIPT", "NETWORK"))

    def run(*argv, name="run", script=own_script, network=True, **options):
        flags = tiny.TINY_DIFFUSION if network else tiny.TINY_DIFFUSION[len(tiny.TINY_NETWORK) :]
        if own_network is not None or isinstance(network, list):
            flags = [*tiny.TINY_RUN, *(network if isinstance(network, list) else own_network)]
        return tiny.train(folder / name, *argv, script=script, flags=flags, **options)

    return run


@pytest.fixture
def train(tmp_path, request):
    """
    Runs a script into a folder of the test's own, by its name. A test's module names its own script as SCRIPT, and the
    flags that take the place of the tiny U-Net's as NETWORK. With `network=False` the network is left to other flags; a list
    are the flags of another family's.
    """
    return _trainer(request.module, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A run of six steps by the module's script, with its loss curves: for tests that only read it."""
    return _trainer(request.module, tmp_path_factory.mktemp("finished"))(plots=True)


@pytest.fixture
def train_in_two(train, monkeypatch):
    """A run that is told to stop after a step, and resumed."""
    from tiny_diffusers.training.trainer import Trainer

    def run(*argv, stopped_at, name="resumed", **options):
        step = Trainer.train_step

        def stopping(self):
            step(self)
            if self.step == stopped_at:
                self.received_signal = 15

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", stopping)
            with pytest.raises(SystemExit):
                train(*argv, name=name, **options)
        return train(*argv, "--resume_from_checkpoint", "latest", name=name, **options)

    return run


@pytest.fixture
def check_mistake(train):
    """That a mistake is one line, with these words in it."""
    from tiny_diffusers.errors import UserError

    def check(argv, words, **options):
        with pytest.raises(UserError) as error:
            train(*argv, **options)
        assert "\n" not in str(error.value).strip()
        for word in words:
            assert word in str(error.value)

    return check


@pytest.fixture
def read_log():
    return tiny.read_log
