"""The command `shrp-hf`: a module a command, each registered by being imported."""

from shrp_hf.cli.app import app, main
from shrp_hf.cli.benchmark import benchmark
from shrp_hf.cli.card import card
from shrp_hf.cli.compare import compare
from shrp_hf.cli.compress import compress
from shrp_hf.cli.export import export
from shrp_hf.cli.inspect import inspect
from shrp_hf.cli.panels import arrange
from shrp_hf.cli.prune import prune
from shrp_hf.cli.train import demo, train
from shrp_hf.cli.trim_vocabulary import trim_vocabulary

arrange(app)

__all__ = [
    "app",
    "benchmark",
    "card",
    "compare",
    "compress",
    "demo",
    "export",
    "inspect",
    "main",
    "prune",
    "train",
    "trim_vocabulary",
]
