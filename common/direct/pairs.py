"""Teacher pairs for direct distillation: what (prompt, seed) the teacher was asked, and the latents that it gave.

A folder of pairs holds `dataset_config.json` and tar shards of fixed ranges of indices. Pair i is `NNNNNNNNN.json`
(index, prompt, seed, sha256 of the float32 unit noise, the size of pairs that were made of images) and `.safetensors`
(`latents`, as the pipeline calls them, in its dtype), optionally `.png`. The bytes depend on what the pairs are
made of alone, not on the number of processes. `generate_pairs` asks a teacher, `sources.py` encodes its images.
"""

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path

from common.data.cached_latents import manifest_digest
from common.direct.probes import noise_sha256
from common.errors import UserError, blame
from common.files import check_place, whole
from common.keyed_random import keyed_seed

import torch
import webdataset as wds
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

CONFIG = "dataset_config.json"
FORMAT = 1
DAMAGE = tarfile.TarError, ValueError, KeyError, TypeError, OSError


def shard_path(folder, shard):
    return Path(folder, f"{shard:05d}.tar")


def shard_range(shard, num_pairs, samples_per_shard):
    return range(shard * samples_per_shard, min((shard + 1) * samples_per_shard, num_pairs))


def missing_shards(folder, config, part=(0, 1)):
    """(all, those that are not there) of the shards range(index, n, count) of a task, (index, count) `part`."""
    own = list(range(num_shards(config)))[part[0] :: part[1]]
    return own, [shard for shard in own if not shard_path(folder, shard).is_file()]


def num_shards(config):
    return math.ceil(config["num_pairs"] / config["samples_per_shard"])


def recorded(scheduler):
    """What a configuration says of the scheduler that made the pairs, as `student.check_pairs` reads it."""
    public = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, "config": public}


def check_folder(folder):
    """UserError for a folder that no pairs can be written to, since it is a file or holds others; needs no teacher."""
    check_place(Path(folder, CONFIG))


def write_config(folder, config, free=("versions",)):
    """Write CONFIG, or check that the one which is there says the same but for keys `free`; called by every process.

    Raises UserError as `check_folder` does, and for a folder with pairs that other flags made. What an older version
    did not write down is not compared.
    """
    check_folder(folder)
    folder, flag = Path(folder), f"`output_dir`={folder}"
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if (folder / CONFIG).exists():
        there, here = json.loads((folder / CONFIG).read_text(encoding="utf-8")), json.loads(text)
        changed = [key for key in sorted(there) if there[key] != here.get(key) and key not in free]
        if changed:
            told = ", ".join(_difference(key, there[key], here.get(key)) for key in changed)
            raise UserError(
                f"{flag} holds pairs of other flags ({told}); repeat the command that began it, delete it, or name a "
                "new folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / CONFIG) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag} cannot be written to ({error.strerror}); name another folder") from None


def _difference(name, there, here):
    """In words; of the call's arguments, those that differ."""
    if name == "kwargs":
        names = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        return ", ".join(_difference(key, there.get(key), here.get(key)) for key in names)
    told = f"{name} was {there!r} and is {here!r}"
    return told if len(told) < 100 else f"{name} is another"


def write_shard(path, pairs):
    """Write the members of `pairs` to a tar that is complete or does not exist.

    pairs: (index, prompt, seed, latents of one sample, uint8 image (H, W, 3) or None, (height, width) in pixels where
    the sample's call is to say it, else None).
    """
    with whole(path) as unfinished:
        with open(unfinished, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for index, prompt, seed, latents, image, size in pairs:
                record = {"index": index, "prompt": prompt, "seed": seed} | ({"size": size} if size else {})
                record["noise_sha256"] = noise_sha256(seed, latents.numel())
                members = {"json": json.dumps(record, ensure_ascii=False).encode()}
                members["safetensors"] = save({"latents": latents.contiguous()})
                if image is not None:
                    png = io.BytesIO()
                    Image.fromarray(image).save(png, format="png")
                    members["png"] = png.getvalue()
                tar.write({"__key__": f"{index:09d}"} | members)


def report(who, own, config, folder):
    """The last line of a tool: what its process has done, `own` shards, and how much of the whole is there by now."""
    wanted, missing = missing_shards(folder, config)
    if len(own) == len(wanted):  # of one process
        print(f"done: {config['num_pairs']} pairs are in {folder}, in {len(wanted)} shard(s)", flush=True)
        return
    there = f"{len(wanted) - len(missing)} of {len(wanted)} shards are in {folder}"
    done = f"{len(own)} of its {len(own)} shards are done; {there}"
    print(f"{who}: {done}", flush=True)


def read_config(folder):
    """CONFIG of a folder of pairs; UserError unless it is there and every shard is complete."""
    flag, path = f"`pairs_dir`={folder}", Path(folder, CONFIG)
    if not path.is_file():
        raise UserError(
            f"{flag}: no {CONFIG} in it, nor cached latents; make pairs with `python -m common.tools.generate_pairs`, "
            "or of a teacher's images with encode_pairs or encode_shards"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        shards, missing = missing_shards(folder, config)
        scheduler = config["scheduler"]
        if not isinstance(config["kwargs"], dict) or not isinstance(scheduler["config"], dict):
            raise ValueError("kwargs and the scheduler's config must be objects")
        _ = scheduler["class"], config["pipeline"], config["weights_sample"].items(), config["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{flag}: its {CONFIG} cannot be read ({error!r}); make the pairs again") from None
    if config.get("format") != FORMAT:
        raise UserError(f"{flag}: its format is {config.get('format')!r}, this version reads {FORMAT}")
    if missing:
        there = f"{len(shards) - len(missing)} of {len(shards)} shards"
        raise UserError(f"{flag} holds {there}; repeat the command that began it, to finish it")
    return config


class Pairs:
    """Pairs by index: prompts, seeds, and of those that were made of images `sizes`, (height, width).

    steps: numbers of steps that the student is to take. config: CONFIG, and hashes: of their noise, of pairs that are
    in their form on disk.
    """

    config = None

    def __init__(self):
        self.prompts, self.seeds, self.sizes, self.hashes, self.steps = [], [], [], [], set()

    def __len__(self):
        return len(self.prompts)

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size, which is one, of pairs that were made of
        images."""
        size = self.sizes[indices[0]]
        return {"height": size[0], "width": size[1]} if size else {}


class PairShards(Pairs):
    """The pairs of a folder: prompts and seeds in memory, latents read when they are asked for."""

    def __init__(self, folder):
        super().__init__()
        self.config, self._places = read_config(folder), []
        self.steps = set(self.config.get("student_steps", []))
        for shard in range(num_shards(self.config)):
            path = shard_path(folder, shard)
            way_out = "delete it and repeat the command that made it"
            with blame(f"`pairs_dir`={folder}: {path.name} is damaged", *DAMAGE, way_out=way_out):
                self._index(path)
        if len(self._places) != self.config["num_pairs"]:
            raise UserError(
                f"`pairs_dir`={folder}: {len(self._places)} pairs where {CONFIG} says {self.config['num_pairs']}"
            )

    def _index(self, path):
        records, places = {}, {}
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension == "json":
                    records[stem] = json.loads(tar.extractfile(member).read())
                elif extension == "safetensors":
                    places[stem] = path, member.offset_data, member.size
        for stem, record in records.items():
            if record["index"] != len(self.prompts) or stem not in places:
                raise ValueError(f"pair {len(self.prompts)} is not in its place or has no latents")
            self.prompts.append(str(record["prompt"]))
            self.seeds.append(int(record["seed"]))
            self.hashes.append(record["noise_sha256"])
            self.sizes.append(tuple(map(int, record["size"])) if "size" in record else None)
            self._places.append(places[stem])

    def latents(self, indices):
        """(B, ...) in the dtype that they were stored in."""
        found = []
        for index in indices:
            path, offset, size = self._places[index]
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    found.append(load(file.read(size))["latents"])
            except (OSError, SafetensorError, KeyError) as error:
                raise UserError(
                    f"`pairs_dir`: pair {index} in {path} cannot be read ({error}); make it again", on_one_rank=True
                ) from None
        return torch.stack(found)


def standard_deviation(data, indices):
    """Of all values of some pairs' latents that are finite."""
    sampled = torch.cat([data.latents([i]).float().flatten() for i in indices])
    finite = sampled.isfinite()
    return (sampled if finite.all() else sampled[finite]).std().item()


def split(num_pairs, num_held_out):
    """(training, held-out) indices: the last ones are held out."""
    return range(num_pairs - num_held_out), range(num_pairs - num_held_out, num_pairs)


class PairOrder:
    """Which training pairs a micro-batch holds: an endless sequence of keyed permutations, cut into batches.

    Global micro-batch j has samples jB to (j + 1)B of that sequence, so the order does not depend on the number of
    processes and a resumed run needs to know nothing but j.
    """

    def __init__(self, num_train, batch_size, seed):
        self.num_train, self.batch_size, self.seed = num_train, batch_size, seed
        self._epochs = {}

    def _permutation(self, epoch):
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "pairs", epoch))
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = torch.randperm(self.num_train, generator=generator).tolist()
        return self._epochs[epoch]

    def __getitem__(self, micro_batch):
        places = range(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)
        return [self._permutation(place // self.num_train)[place % self.num_train] for place in places]


def fingerprint(data):
    """What tells these pairs from others in their place: prompts, seeds and the arguments of the teacher's call."""
    what = [data.prompts, data.seeds, data.config and data.config["kwargs"]]
    what += [manifest_digest(data.manifest)] if hasattr(data, "manifest") else []  # of cached latents
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


KINDS = {  # of data: what a checkpoint calls their fingerprint
    "pairs_sha256": "pairs than `pairs_dir` or `dataset_metadata_path` holds",
    "score_prompts_sha256": "prompts than `score_prompts` holds",
    "adv_images_sha256": "images than `adv_images` holds",
}


def fingerprints(data, score_prompts=(), images=None):
    """{as of KINDS: the fingerprint} of all that a run is trained on. images: a `sources.TableImages`, or None."""
    found = {"pairs_sha256": fingerprint(data)}
    if score_prompts:
        found["score_prompts_sha256"] = hashlib.sha256(json.dumps(score_prompts).encode()).hexdigest()
    if images:
        found["adv_images_sha256"] = hashlib.sha256(json.dumps(images.identity()).encode()).hexdigest()
    return found


def check_same_data(checkpoint, resumed, fingerprints):
    """UserError when `checkpoint`, of state `resumed`, was trained on data of another fingerprint, whatever their
    folder is called. What an older version did not write down is not compared."""
    for name, sha256 in fingerprints.items():
        if resumed.get(name, sha256) != sha256:
            raise UserError(
                f"`resume_from_checkpoint`={checkpoint} was trained on other {KINDS[name]} now; put them back, or "
                "name a new `output_dir`"
            )
