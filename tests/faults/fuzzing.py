"""Ways to damage a saved model, each a function of a folder and a random generator."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OURS = (
    "expert_layers",
    "pending_layers",
    "kept_heads",
    "intermediate_sizes",
    "output_bias",
    "routed",
    "experts_per_sequence",
    "router_pooling",
    "router_aux_loss_coef",
    "format_version",
)
WILD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 12, 1.5, -0.0, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400,
    float("nan"), float("inf"), "", "1", "cls", "\x00", "é" * 500,
    "../../x", "/etc/passwd", "__import__", "load", "float16", "torch.load",
    [], [0], [0, 0], [-1], [99], [2**63], [1.0], [True], ["0"], [None], [[]], [[0], [1], [2]], [[0, 1, 2, 3]] * 3,
    [[3, 0]] * 3, [[0], [1]], [[2**63]] * 3, [0] * 100_000, {}, {"0": [0]}, {"a": {"b": None}}, {"0": 1}, {"x": ["y"]},
)  # fmt: skip
PLACES = ("../outside", "../../x", "/etc/passwd", "other/repo--modeling_x", "..", ".", "")


class Canary:
    """A pickle of one of these leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


# --- any file ---


def truncate(path: Path, rng: random.Random) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: rng.choice((0, 1, 7, 8, rng.randrange(len(whole)), len(whole) - 1))])


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> None:
    """Flips one to eight bits."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(start, len(data) if stop is None else stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def garble(path: Path, rng: random.Random) -> None:
    """Overwrites, inserts or cuts out a piece."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    piece = rng.randbytes(rng.randrange(1, 64))
    path.write_bytes(data[:start] + piece + data[start + rng.choice((0, len(piece), 500)) :])


def replace_by_no_file(path: Path, rng: random.Random, kinds: int = 3) -> None:
    path.unlink()
    kind = rng.randrange(kinds)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)  # to itself
    elif kind == 3:
        os.mkfifo(path)  # whoever opens it waits for a writer


def nest(path: Path, rng: random.Random) -> None:
    depth = rng.choice((100, 10_000, 200_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    path.write_text(opening * depth + "1" + closing * depth)


# --- config.json ---


def edit(change: Callable[[dict, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = folder / CONFIG
        config = json.loads(path.read_text())
        change(config, rng)
        path.write_text(json.dumps(config))

    return mutate


def wild_value(config: dict, rng: random.Random) -> None:
    config[rng.choice(sorted(config))] = rng.choice(WILD)


def wild_value_of_ours(config: dict, rng: random.Random) -> None:
    config[rng.choice(OURS)] = rng.choice(WILD)


def several_wild_values(config: dict, rng: random.Random) -> None:
    for _ in range(3):
        wild_value(config, rng)


def other_size(config: dict, rng: random.Random) -> None:
    sizes = [name for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    name = rng.choice(sizes)
    config[name] = rng.choice((config[name] + 1, config[name] - 1, config[name] * 2, config[name] // 2, 2**40, -config[name]))


def lost_field(config: dict, rng: random.Random) -> None:
    del config[rng.choice(sorted(config))]


def lost_field_of_ours(config: dict, rng: random.Random) -> None:
    del config[rng.choice(sorted(set(OURS) & set(config)))]


def misspelt_field(config: dict, rng: random.Random) -> None:
    name = rng.choice(OURS)
    place = rng.randrange(len(name))
    config[name[:place] + name[place + 1 :]] = config.pop(name)


def no_object(folder: Path, rng: random.Random) -> None:
    (folder / CONFIG).write_text(rng.choice(("", "null", "[]", "1", '"text"', "[{}]", "{", "NaN", "\ufeff{}")))


def pointing_elsewhere(config: dict, rng: random.Random) -> None:
    place = rng.choice(PLACES)
    field, value = rng.choice(
        (
            ("auto_map", {"AutoConfig": f"{place}.Config", "AutoModelForSequenceClassification": f"{place}.Model"}),
            ("auto_map", place),
            ("configuration_files", [f"config.{place}.json", f"{place}/config.json"]),
            ("_name_or_path", place),
            ("attn_implementation", place),
            ("_attn_implementation", place),
            ("dtype", place),
            ("torch_dtype", "load"),
            ("architectures", [place]),
            ("model_type", place),
            ("transformers_weights", f"{place}/model.safetensors"),
            ("base_model_name_or_path", place),
            ("quantization_config", {"quant_method": place}),
            ("quantization_config", place),
            ("hidden_act", "__import__"),
            ("label2id", {place: 2**70}),
            ("id2label", {place: place}),
            ("pruned_heads", {place: [0]}),
            ("pruned_heads", {"0": [2**70]}),
        )
    )
    config[field] = value


# --- model.safetensors ---


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _header(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edit_header(change: Callable[[dict, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = rng.choice(_weights(folder))
        header, rest = _header(path.read_bytes())
        change(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return mutate


def edit_tensors(change: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Callable[[Path, random.Random], None]:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = rng.choice(_weights(folder))
        tensors = load_file(path)
        change(tensors, rng)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})

    return mutate


def _pick(header: dict, rng: random.Random) -> dict:
    return header[rng.choice(sorted(set(header) - {"__metadata__"}))]


def wild_shape(header: dict, rng: random.Random) -> None:
    entry = _pick(header, rng)
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        ([2**40], [2**63, 2], [-1], [], shape[::-1], [1, *shape], [*shape, 1], [*shape, 0], "x", None, [0.5], [2**20, 2**20])
    )


def wild_dtype(header: dict, rng: random.Random) -> None:
    entry = _pick(header, rng)
    entry["dtype"] = rng.choice(("I32", "U32", "F32", "F64", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "", "x", None, 1))


def wild_offsets(header: dict, rng: random.Random) -> None:
    entry = _pick(header, rng)
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        ([stop, start], [0, 2**63], [start + 1, stop + 1], [-1, stop], [start], [0, 0], [2**64, 2**64], [start, stop - 4], "x")
    )


def wild_metadata(header: dict, rng: random.Random) -> None:
    formats = ({"format": kind} for kind in ("tf", "flax", "x", 1))
    header["__metadata__"] = rng.choice(({}, None, "pt", [], *formats))


def header_length(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_weights(folder))
    data = path.read_bytes()
    size = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) * 2))
    path.write_bytes(struct.pack("<Q", size) + data[8:])


def flip_header(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_weights(folder))
    flip(path, rng, 0, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


def flip_data(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_weights(folder))
    flip(path, rng, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


def drop_tensor(tensors: dict, rng: random.Random) -> None:
    for name in rng.sample(sorted(tensors), min(len(tensors), rng.choice((1, 1, 3)))):
        del tensors[name]


def drop_all(tensors: dict, rng: random.Random) -> None:
    tensors.clear()


def add_tensor(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((name + ".extra", name.replace("layer.0", "layer.9"), "x", "bert.encoder.layer.1.router.weight"))] = (
        torch.zeros(rng.choice(((2,), (32, 32), (0,), ())))
    )


def rename_tensor(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((name.upper(), name[:-1], "x." + name, name.replace(".0.", ".1.")))] = tensors.pop(name)


def reshape_tensor(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    value = tensors[name]  # every one has a dimension
    tensors[name] = rng.choice((value[:-1], value[..., :-1], value.flatten(), value[None], value[:0], value[:1]))


def recast_tensor(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.int8)
    tensors[name] = tensors[name].to(rng.choice(dtypes))


def poison_tensor(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = torch.full_like(tensors[name].float(), rng.choice((float("nan"), float("inf"), -3e38)))


# --- the folder ---


def pickle_instead(folder: Path, rng: random.Random) -> None:
    """A pickle that would leave a directory, as a zip of torch or bare, in the place of the weights."""
    tensors = load_file(_weights(folder)[0])
    for path in _weights(folder):
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    name = rng.choice(("pytorch_model.bin", "pytorch_model.bin", WEIGHTS, "model.bin", "pytorch_model.pt"))
    payload = rng.choice((Canary(folder / "canary"), tensors | {"x": Canary(folder / "canary")}, tensors))
    if rng.random() < 0.5:
        torch.save(payload, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(payload))
    if name == "pytorch_model.bin" and rng.random() < 0.3:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def pickle_beside(folder: Path, rng: random.Random) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "adapter_model.bin"):
        torch.save(Canary(folder / "canary"), folder / name)


def code_beside(folder: Path, rng: random.Random) -> None:
    """Python files of our names and of a chosen one, all of which would leave a directory."""
    names = ("modeling_shrp_bert.py", "configuration_shrp_bert.py", "torch.py", "x.py", "__init__.py")
    for name in names:
        (folder / name).write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")
    if rng.random() < 0.7:
        edit(lambda config, _: config.update(auto_map={"AutoConfig": "x.X", "AutoModelForSequenceClassification": "x.X"}))(
            folder, rng
        )


def adapter_beside(folder: Path, rng: random.Random) -> None:
    """An adapter's config, which makes Transformers open another model than the one that was asked for."""
    config = {"base_model_name_or_path": rng.choice((str(folder / "other"), "../outside", "x/y")), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def index_elsewhere(folder: Path, rng: random.Random) -> None:
    """An index whose files lie outside of the folder."""
    names = sorted(load_file(_weights(folder)[0]))
    outside = folder.parent / "outside"
    place = rng.choice(("../outside/model.safetensors", str(outside / WEIGHTS), "../../x", "/etc/passwd", ".", "", "x\x00y"))
    for path in _weights(folder):
        path.unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}))


def wild_index(folder: Path, rng: random.Random) -> None:
    names = sorted(load_file(_weights(folder)[0]))
    good = dict.fromkeys(names, _weights(folder)[0].name)
    index: Any = rng.choice(
        (
            None,
            [],
            {},
            {"weight_map": {}},
            {"weight_map": []},
            {"weight_map": {name: 1 for name in names}},
            {"weight_map": {name: None for name in names}},
            {"weight_map": good},
            {"metadata": None, "weight_map": good},
            {"metadata": {"total_size": 10**400}, "weight_map": good},
            {"metadata": {}, "weight_map": {"x": "nowhere.safetensors"}},
        )
    )
    if rng.random() < 0.6:
        for path in _weights(folder)[1:] or _weights(folder):
            path.rename(folder / f"model-{path.name}")
    (folder / INDEX).write_text(json.dumps(index))


def link_to_outside(folder: Path, rng: random.Random) -> None:
    """What the Hub's cache does with every file."""
    name = rng.choice((CONFIG, *(path.name for path in _weights(folder))))
    target = folder.parent / f"linked-{name}"
    (folder / name).replace(target)
    (folder / name).symlink_to(target)


def wild_generation_config(folder: Path, rng: random.Random) -> None:
    (folder / "generation_config.json").write_text(rng.choice(("{", "[]", '{"max_length": 1e308}', "null")))


def no_file_but_perhaps_a_pipe(path: Path, rng: random.Random) -> None:
    replace_by_no_file(path, rng, kinds=4)


def on_config(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: change(folder / CONFIG, rng)


def on_weights(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: change(rng.choice([*_weights(folder), *folder.glob(INDEX)]), rng)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "config: truncated": on_config(truncate),
    "config: bits flipped": on_config(flip),
    "config: garbled": on_config(garble),
    "config: no file": on_config(no_file_but_perhaps_a_pipe),
    "config: nested": on_config(nest),
    "config: no object": no_object,
    "config: wild value": edit(wild_value),
    "config: wild value of ours": edit(wild_value_of_ours),
    "config: several wild values": edit(several_wild_values),
    "config: other size": edit(other_size),
    "config: lost field": edit(lost_field),
    "config: lost field of ours": edit(lost_field_of_ours),
    "config: misspelt field": edit(misspelt_field),
    "config: pointing elsewhere": edit(pointing_elsewhere),
    "weights: truncated": on_weights(truncate),
    "weights: garbled": on_weights(garble),
    "weights: no file": on_weights(no_file_but_perhaps_a_pipe),
    "weights: bits of the header": flip_header,
    "weights: bits of the data": flip_data,
    "weights: length of the header": header_length,
    "weights: shape": edit_header(wild_shape),
    "weights: dtype": edit_header(wild_dtype),
    "weights: offsets": edit_header(wild_offsets),
    "weights: metadata": edit_header(wild_metadata),
    "weights: dropped": edit_tensors(drop_tensor),
    "weights: all dropped": edit_tensors(drop_all),
    "weights: added": edit_tensors(add_tensor),
    "weights: renamed": edit_tensors(rename_tensor),
    "weights: reshaped": edit_tensors(reshape_tensor),
    "weights: recast": edit_tensors(recast_tensor),
    "weights: poisoned": edit_tensors(poison_tensor),
    "folder: pickle instead": pickle_instead,
    "folder: pickle beside": pickle_beside,
    "folder: code beside": code_beside,
    "folder: adapter beside": adapter_beside,
    "folder: index elsewhere": index_elsewhere,
    "folder: wild index": wild_index,
    "folder: link": link_to_outside,
    "folder: generation config": wild_generation_config,
}
