"""What forked processes have imported before they fork: every command, and what commands import when they need it."""

import gc
import importlib

from fork_server import COMMANDS, SCRIPTS, collect_rarely, work_little

collect_rarely()

for name in (*COMMANDS, *SCRIPTS.values(), "preprocessing.encoders"):
    importlib.import_module(name)
for name in (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.dinov2.modeling_dinov2",
):
    importlib.import_module(name)
work_little()
gc.freeze()  # a forked process need not walk through what is imported
