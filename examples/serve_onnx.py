"""Export a pruned classifier to ONNX, then serve it in a process that imports neither torch nor Transformers.

python examples/serve_onnx.py --model out/demo/static --output out/onnx --int8 "Opens a file." "Inverts a matrix."
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np


def serve(folder: Path, sentences: list[str]) -> list[str]:
    """Classifies sentences with onnxruntime and tokenizers alone: all that a server has to install."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    padding = config.get("pad_token_id") or 0
    tokenizer.enable_padding(pad_id=padding, pad_token=tokenizer.id_to_token(padding))
    tokenizer.enable_truncation(128)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    encoded = tokenizer.encode_batch(sentences)
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    feed = {node.name: np.array([getattr(text, columns[node.name]) for text in encoded]) for node in session.get_inputs()}
    (logits,) = session.run(["logits"], feed)
    return [config["id2label"][str(label)] for label in logits.argmax(-1)]


def main() -> None:
    """Exports, then starts this script again to serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub id of the classifier; left out: serve what --output holds")
    parser.add_argument("--output", type=Path, default=Path("out/onnx"), help="directory of the exported model")
    parser.add_argument("--int8", action="store_true", help="quantise")
    parser.add_argument("sentences", nargs="+", help="what to classify")
    words = parser.parse_args()
    if words.model is None:
        loaded = [name for name in ("torch", "transformers", "shrp_hf") if name in sys.modules]
        print(json.dumps({"labels": serve(words.output, words.sentences), "imported": loaded}))
        return
    from shrp_hf.export import export_onnx, load_for_export

    model, tokenizer = load_for_export(words.model)
    path = export_onnx(model, tokenizer, words.output, int8=words.int8)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    subprocess.run([sys.executable, __file__, "--output", str(words.output), *words.sentences], check=True)


if __name__ == "__main__":
    main()
