"""A full disk or a target that cannot be written: one clear error that names the path, and what was there stays."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizer

from shrp_hf.head_stats import StatsRequest, collect_head_stats
from shrp_hf.onnx_export import export_onnx
from shrp_hf.plan import KeepPlan
from shrp_hf.report import write_text
from tests.faults.isolation import FORK, silence
from tests.tiny import batch, same_state, tiny_bert
from tests.tiny_training import trainer_for
