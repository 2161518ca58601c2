"""What a folder of weights holds against what its network needs, by the headers of its safetensors: nothing is loaded.

The libraries' own loaders, on the meta device, say which tensors are missing or left over, so that what they rename,
tie and ignore is accepted here too. Left out: quantized networks, whose tensors the quantizer makes.
"""

import json
import os
import re
from pathlib import Path

from common.errors import CALL_ERRORS, UserError, blame

import accelerate
import diffusers
import torch
import transformers
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights
from huggingface_hub import snapshot_download, try_to_load_from_cache

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_NAMES = (".lora_", "lora_A.", "lora_B.", ".base_layer.")
SAID = set()  # notes that were printed
dry_run = False  # whether this is one, to which configurations alone are enough
STEMS = {diffusers.ModelMixin: "diffusion_pytorch_model", transformers.PreTrainedModel: "model"}
FUSE = (
    "save it again from the pipeline that has the LoRA, after pipe.fuse_lora() and pipe.unload_lora_weights(), or "
    "name the model without it"
)
COMPARED = {}  # networks that are alike, such as the two of Wan 2.2, are compared once
SAVE_AGAIN = "save or download this part again, with the config.json that belongs to it"


def check_name(flag, name):
    """UserError where `name` is one file of pickled weights, or a file of these that is not there."""
    if Path(name).suffix.lower() in PICKLES and not Path(name).is_dir():
        raise UserError(
            f"{flag}: a {Path(name).suffix} file is a pickle, which could run code; convert it to .safetensors, or "
            "to a folder in diffusers layout"
        )


def local_folder(name, file="model_index.json", revision=None, cache_dir=None):
    """The folder `name`, or the one that holds `file` of a hub repository in the cache; None where there is none."""
    if Path(name).is_dir():
        return Path(name, file).parent
    found = try_to_load_from_cache(str(name), file, cache_dir=cache_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def network_folder(name, subfolder=None, revision=None, cache_dir=None):
    """The folder of a network that lies in the folder `name`, or in a hub repository, of which it is downloaded."""
    if not Path(name).is_dir():
        wanted = [f"{subfolder}/*" if subfolder else "*"]
        unwanted = [f"*{end}" for end in PICKLES]
        options = {"allow_patterns": wanted, "ignore_patterns": unwanted}
        name = snapshot_download(str(name), revision=revision, cache_dir=cache_dir, **options)
    return Path(name, subfolder or "")


def check_parts(flag, name, index, skip=()):
    """UserError unless a local pipeline has a folder, with something in it, for each part of its model_index.json."""
    for part in _parts(index, skip) if Path(name).is_dir() else ():
        folder = Path(name, part)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(f"{flag}: it is partial, its folder {part}/ is missing or empty")


def check_pipeline(flag, name, index, variant=None, revision=None, cache_dir=None, skip=(), downloaded=False):
    """UserError unless every network of a pipeline has its weights, and none has an adapter in it.

    name: folder, or a hub name of which this is checked that the cache holds. index: its model_index.json. skip: parts
    that are not loaded from it. downloaded: of a hub name, whether all of its files are in the cache by now. In a dry
    run a folder may hold no weights at all, which is said.
    """
    folder = local_folder(name, revision=revision, cache_dir=cache_dir)
    if folder is None:
        return
    whole, parts = downloaded or Path(name).is_dir(), _parts(index, skip)
    if whole and dry_run and _has_no_weights(folder, parts):
        print(f"WARNING: {flag} holds no weights; `dry_run` needs none, the run itself does", flush=True)
        return
    variants = {part: variant for part in index if variant and has_variant(folder / part, variant)}
    if variant and not variants and whole:
        raise UserError(f"{flag}: it is partial, it has no weights of the variant {variant!r}; drop `variant`")
    for part, (library, class_name) in parts.items():
        cls = _network_class(library, class_name)
        if cls is not None and (whole or _weight_files(folder / part)):
            check_network(flag, folder / part, cls, variants.get(part), of_pipeline=variant or True)


def _has_no_weights(folder, parts):
    names = [path.name for part in parts if (folder / part).is_dir() for path in (folder / part).iterdir()]
    return not any(name.endswith((".safetensors", ".msgpack", ".h5", ".index.json", *PICKLES)) for name in names)


def has_variant(folder, variant):
    """Whether diffusers takes a part's weights of this variant, rather than the plain ones."""
    return folder.is_dir() and any(path.name.partition(".")[2].startswith(variant) for path in folder.iterdir())


def check_alone(flag, name, cls, subfolder=None, revision=None, cache_dir=None, **options):
    """`check_network` of a network that is no part of a pipeline; of the hub's where the cache has its weights."""
    folder = local_folder(name, "/".join(filter(None, (subfolder, "config.json"))), revision, cache_dir)
    if folder is not None and (Path(name).is_dir() or any(folder.glob("*.safetensors"))):
        check_network(flag, folder, cls, **options)


def check_network(flag, folder, cls, variant=None, of_pipeline=None, has_variant_flag=True):
    """UserError unless the folder holds, as safetensors, the tensors that a `cls` of its configuration consists of.

    of_pipeline: of a pipeline's part, the `variant` that was asked for, or True; None of a network alone, which has
    has_variant_flag, or always takes the plain files.
    """
    where = f"{folder.name}/" if of_pipeline else ""  # of a part, what precedes its files' names
    if issubclass(cls, transformers.PreTrainedModel) and (folder / "adapter_config.json").is_file():
        raise UserError(f"{flag}: {where or 'it'} was saved with a LoRA on it (adapter_config.json); {FUSE}")
    with blame(f"{flag}: {where or 'it '}has no configuration that can be read", OSError, *CALL_ERRORS):
        config = _load_config(folder, cls)
    advice = _variant_advice(variant, of_pipeline, has_variant_flag)
    files, named = _find_files(flag, folder, where, cls, variant, advice)
    shapes = {}
    for file in files:
        shapes |= _read_header(flag, file, where)
    what = f"{flag}: its file {where}{named}"
    _refuse_adapters(what, shapes)
    name = "quantization_config"
    if (config.get(name) if isinstance(config, dict) else getattr(config, name, None)) is not None:
        return
    with blame(f"{flag}: {where}config.json describes no {cls.__name__}", RuntimeError, *CALL_ERRORS):
        missing, unexpected, mismatched = _compare(cls, config, shapes, sharded=named.endswith(".json"))
    _refuse(what, cls, missing, unexpected, mismatched)


def check_loaded(flag, network, info):
    """The same from what a library's `output_loading_info=True` says, where the files were not there before."""
    _refuse_adapters(f"{flag}: it", info["unexpected_keys"])
    _refuse(flag, type(network), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), [])


def _refuse_adapters(what, names):
    adapters = [key for key in names if any(name in f".{key}" for name in ADAPTER_NAMES)]
    if adapters:
        raise UserError(f"{what} was saved with a LoRA on it ({adapters[0]}); {FUSE}")


def check_made(flag, pipeline):
    """UserError where a pipeline that was made from one file has networks of which the file lacks tensors."""
    for part, module in pipeline.components.items():
        tensors = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
        missing = [name for name, tensor in tensors if tensor.is_meta]
        if missing:
            raise UserError(f"{flag}: it lacks {len(missing)} tensors of its {part} ({_first(missing)}); {SAVE_AGAIN}")


def fit_tokenizers(pipeline):
    """Cut captions where the text encoder ends also of tokenizers whose files do not say where that is, in place."""
    for name, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        length = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if name.startswith("tokenizer") and tokenizer is not None and length:
            tokenizer.model_max_length = min(tokenizer.model_max_length, length)


def _parts(index, skip):
    pairs = {part: value for part, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    return {k: v for k, v in pairs.items() if k not in skip and isinstance(v[0], str) and isinstance(v[1], str)}


def _network_class(library, name):
    """The class of a part, or None for tokenizers, schedulers and what the library does not have."""
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    cls = getattr(module or getattr(diffusers.pipelines, library, None), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, tuple(STEMS)) else None


def _weight_files(folder):
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in sorted(names) if name.endswith(".safetensors") and not name.startswith("adapter_")]


def _with_variant(name, variant):
    stem, _, end = name.rpartition(".")
    return f"{stem}.{variant}.{end}" if variant else name


def _variant_advice(variant, of_pipeline, has_variant_flag):
    """(sentence without, sentence with the name of) the weights that are there under another variant's name."""
    if variant:
        return "drop `variant`"
    if of_pipeline not in (None, True):  # another variant was asked for, and this part has it not
        return f"it has neither these nor the variant {of_pipeline!r}: save the pipeline again as a whole"
    return "pass its `variant`" if has_variant_flag else "save it again without a variant"


def find_files(folder, cls, variant=None):
    """(paths of the safetensors files of a network's weights, name of the one file or of the index)."""
    return _find_files(str(folder), folder, "", cls, variant, "")


def _find_files(flag, folder, where, cls, variant, advice):
    """(paths of the files, name of the one file or of the index), as the library of `cls` looks for them."""
    stem = next(stem for base, stem in STEMS.items() if issubclass(cls, base))
    single, index = (_with_variant(f"{stem}.safetensors{end}", variant) for end in ("", ".index.json"))
    legacy = f"{stem}.safetensors.{variant}.index.json"
    order = [single, index] if issubclass(cls, transformers.PreTrainedModel) else [index, legacy, single]
    named = next((name for name in order if (folder / name).is_file()), None)
    place, weights = f"its folder {where}" if where else "the folder", _weight_files(folder)
    if named is None:
        there = sorted(path.name for path in folder.iterdir())
        pickled = [name for name in there if name.endswith(PICKLES) and not name.startswith("training_args")]
        if pickled and not weights:
            raise UserError(
                f"{flag}: {place} has its weights only as {pickled[0]}, a pickle, which could run code; convert them "
                "to .safetensors"
            )
        if any(name.startswith("adapter_model") for name in there):
            raise UserError(f"{flag}: {place} holds a LoRA alone; {FUSE}")
        what = f"weights of the variant {variant!r}" if variant else "plain weights" if weights else "weights"
        what += f", only {weights[0]} ({advice})" if weights else f" ({single})"
        raise UserError(f"{flag}: it is partial, {place} has no {what}")
    if named == single:
        return [folder / named], named
    with blame(f"{flag}: its file {where}{named} is damaged", OSError, *CALL_ERRORS):
        names = sorted(set(json.loads((folder / named).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{flag}: it is partial, {where}{missing[0]} is missing, which {named} names")
    return [folder / name for name in names], named


def _read_header(flag, path, where):
    """{name: shape} of a file's tensors; its length is checked too. Not mapped: it may be larger than the memory."""
    with blame(f"{flag}: its file {where}{path.name} is damaged", OSError, *CALL_ERRORS):
        length = path.stat().st_size
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < length else {}
        tensors = {name: each for name, each in header.items() if name != "__metadata__"}
        right = 8 + size + max((each["data_offsets"][1] for each in tensors.values()), default=0)
        if length != right:
            raise ValueError(f"it has {length} bytes, and its header says {right}")
        return {name: tuple(each["shape"]) for name, each in tensors.items()}


def _load_config(folder, cls):
    if issubclass(cls, transformers.PreTrainedModel):
        if not (folder / "config.json").is_file():
            raise OSError(f"{folder.name}/ has no config.json")
        return cls.config_class.from_pretrained(folder)
    config = cls.load_config(folder)
    if not isinstance(config, dict):
        raise ValueError(f"{folder.name}/config.json is no JSON object")
    return config


def _compare(cls, config, shapes, sharded):
    """Lists of missing names, of names that are too many, and of (name, shape, right shape) that differ."""
    compare = _compare_transformers if issubclass(cls, transformers.PreTrainedModel) else _compare_diffusers
    key = cls, repr(config), sharded, tuple(sorted(shapes.items()))
    if key not in COMPARED:
        COMPARED[key] = compare(cls, config, shapes, sharded)
    return COMPARED[key]


def _compare_transformers(cls, config, shapes, sharded):
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": {"": "meta"}}
    _, info = cls.from_pretrained(None, config=config, state_dict=state, **options)
    mismatched = [(name, tuple(there), tuple(right)) for name, there, right in info["mismatched_keys"]]
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched)


def _compare_diffusers(cls, config, shapes, sharded):
    """As `ModelMixin.from_pretrained` compares. A buffer that the file lacks is the one that the class has made."""
    if issubclass(cls, LegacyModelMixin) and "norm_type" in config:
        cls = _fetch_remapped_cls_from_config(config, cls)
    with no_init_weights(), accelerate.init_empty_weights():
        network = cls.from_config(config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if not sharded:
        network._fix_state_dict_keys_on_load(state)
    there, needed = {name: tuple(tensor.shape) for name, tensor in state.items()}, network.state_dict()
    learnt = {path for path, m in network.named_modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)}
    made = {name for name, _ in network.named_buffers() if name.rpartition(".")[0] not in learnt}
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    unexpected = [n for n in sorted(there.keys() - needed.keys()) if not any(re.search(p, n) for p in ignored)]
    wrong = [(n, there[n], tuple(needed[n].shape)) for n in sorted(there.keys() & needed.keys())]
    return sorted(needed.keys() - there.keys() - made), unexpected, [row for row in wrong if row[1] != row[2]]


def _refuse(what, cls, missing, beside, mismatched):
    """UserError for tensors that lack or are another network's; what is left over beside them is said, once."""
    said = []
    if missing:
        said.append(f"lacks {len(missing)} tensors, which would be random ({_first(missing)})")
    if mismatched:
        name, there, right = mismatched[0]
        said.append(f"has {len(mismatched)} tensors of another shape ({name} is {there}, not {right})")
    if said:
        raise UserError(f"{what} {' and '.join(said)}; {SAVE_AGAIN}")
    note = f"{what} has {len(beside)} tensors more, which no {cls.__name__} of this configuration uses"
    note += f" ({_first(beside)})"
    if beside and note not in SAID and os.environ.get("RANK", "0") == "0":
        SAID.add(note)
        print(f"{note}: they are not loaded", flush=True)


def _first(names):
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
