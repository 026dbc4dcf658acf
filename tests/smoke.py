"""What has to work where only the package is installed: cut a small model, save it, open it again.

Run as a script, and without anything of this repository on the path, where a wheel or a source distribution was installed:
`python -P tests/smoke.py`.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import shrp_hf

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 40}


def main() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).double().eval()
    plan = shrp_hf.MagnitudeSelector(budget=shrp_hf.Budget.fraction(0.5)).select(model)
    pruned = shrp_hf.prune_heads(model, plan)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad(), shrp_hf.masked_heads(model, plan):
        expected = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        with torch.no_grad():
            found = AutoModelForSequenceClassification.from_pretrained(folder).eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if version("shrp_hf") != shrp_hf.__version__:
        raise RuntimeError(f"installed as {version('shrp_hf')}, but the code is {shrp_hf.__version__}")
    sys.stdout.write(f"shrp_hf {shrp_hf.__version__} works in {Path(shrp_hf.__file__).parent}\n")


if __name__ == "__main__":
    main()
