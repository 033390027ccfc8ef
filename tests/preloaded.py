"""Imported by the server that the harness forks its workers from, so that a worker starts with all of it in memory."""

import contextlib
import gc
import importlib
import sys
from pathlib import Path

# None of these starts a thread but pyarrow, which datasets imports: its allocator's, which it handles at a fork.
# Those that are not installed are left out.
NAMES = [
    "pytest",
    "torch",
    "torch._dynamo",  # the first step of an optimizer imports it
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "sharded_lamb",
    "sharded_lamb.checkpoint",
    "tests.harness",
    "tests.training",
    "torch.utils.tensorboard",
    "transformers.conversion_mapping",
    "transformers.models.bert.modeling_bert",
    "lightning.fabric",
    "lightning.pytorch",
    "hypothesis",
    "datasets",
    "sharded_lamb.bert.train",
]
if not Path("/dev/nvidiactl").exists():
    NAMES.append("deepspeed")  # it asks CUDA for devices, after which no fork can use them
    # Every engine imports it, and it torch.compiles a function, which imports Inductor: five seconds.
    NAMES.append("deepspeed.runtime.zero.muon.muon_optimizer")

gc.disable()  # all of it stays
sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed would import it, for a second and a half
for _name in NAMES:
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
del sys.modules["mlflow"]
if "transformers.conversion_mapping" in sys.modules:  # saving any model makes a table for all of them
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("bert")
if "deepspeed" in sys.modules:
    # Collectives for inference. DeepSpeed compiles them when the first engine starts, which takes a minute, and a
    # worker that is killed meanwhile leaves a lock that all later ones wait for. Launchers' tests use them.
    sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
gc.collect()
gc.enable()
gc.freeze()  # collections in a worker neither look at this nor copy its pages
