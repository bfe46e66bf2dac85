"""The reference: every rank's torch module, all ranks in lockstep, with all that went in and out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moecompiler.config import ExportOptions, ModelConfig
from moecompiler.export_names import cache_names
from moecompiler.mapping import Mapping
from moecompiler.model import Cache, RankModule
from moecompiler.reference import empty_caches, load_rank_module
