"""`experimental.custom_import = "variants"`, for measurements: the plugin, and Llama 3 8B with fewer layers.

Registers the flavors "8B-1L" to "8B-31L": Llama 3 8B cut to that many layers, for GPUs that the whole model does not fit.
"""

import dataclasses

from torchtitan.models.llama3 import llama3_args

import blockfp8_titan.cpu  # noqa: F401

LAYERS = llama3_args["8B"].n_layers

for layers in range(1, LAYERS):
    llama3_args[f"8B-{layers}L"] = dataclasses.replace(llama3_args["8B"], n_layers=layers)
