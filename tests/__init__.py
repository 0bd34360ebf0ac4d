"""Tests. `AUTO_PRECISION=bf16` (or fp32) in the environment makes it what `--precision auto` chooses on a CPU, as on a
processor with (or without) AMX: here, and in every process that a test starts."""

import os

import torch

if forced := os.environ.get("AUTO_PRECISION"):
    torch.cpu._is_amx_tile_supported = {"bf16": lambda: True, "fp32": lambda: False}[forced]
