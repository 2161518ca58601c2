"""What every script leaves: nothing is lost where sampling fails, and the code of its card runs as it stands."""

import re
import runpy
from pathlib import Path

from common.ct import sampling
from common.direct import validation
from common.errors import UserError
from common.networks import teachers
from common.results import export, samples
from common.run import checkpointing
from tests.cases import CASES, command, train

import diffusers
import pytest
from accelerate import Accelerator
from diffusers import DiffusionPipeline

ODD = 'te"a c\\her'  # a folder's name, with what breaks a literal that is not quoted
WEIGHTS = {
    "lcm": ["unet", "unet_target", "scheduler"],
    "lcm_lora": ["pytorch_lora_weights.safetensors", "scheduler"],
    "tscd": ["unet", "unet_target", "stage-0-k2", "stage-1-k1", "scheduler"],
    "tscd_lora": ["pytorch_lora_weights.safetensors", "stage-1-k1", "scheduler"],
    "ct": ["unet", "unet_ema", "scheduler"],
    "direct lora": ["pytorch_lora_weights.safetensors", "scheduler"],
}


def run_code(card, monkeypatch, folder):
    """Run the code of a card as a user does who has no GPU, from another folder; its names."""
    (code,) = re.findall(r"```python\n(.*?)```", Path(card).read_text(encoding="utf-8"), re.S)
    script = folder / "code.py"
    script.write_text(code.replace('.to("cuda")', ""), encoding="utf-8")
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(folder)
        return runpy.run_path(str(script))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name in ("lcm_lora", "tscd") else ()) for name in WEIGHTS]
)
def test_sampling_that_fails_loses_nothing_and_the_code_of_every_card_runs(
    tmp_path, made_for_all, monkeypatch, capsys, name
):
    """An odd name, relative paths, weights of a variant alone, another VAE, another size than the teacher's own."""
    monkeypatch.chdir(tmp_path)
    case, out = CASES[name], Path('o"u t')
    changes = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 1, "logging_steps": 1}
    if name == "ct":
        changes["discretization_s_1"] = 10  # so few updates are enough for one
    else:
        teacher = DiffusionPipeline.from_pretrained(made_for_all["direct_" * ("direct" in name) + "teacher"])
        teacher.save_pretrained(ODD, variant="fp16")
        changes |= {"pretrained_teacher_model": ODD, "variant": "fp16"}
        if "direct" not in name:
            teacher.vae.save_pretrained(f"{ODD} vae")
            changes |= {"resolution": 32, "pretrained_vae_model_name_or_path": f"{ODD} vae"}
    words = command(case, made_for_all, out, **changes)

    def fail(*args, **kwargs):
        raise RuntimeError("no samples\nat all")

    with monkeypatch.context() as broken:
        for module, function in ((samples, "sample_images"), (sampling, "sample"), (validation, "sample_and_measure")):
            broken.setattr(module, function, fail)
        with pytest.raises(SystemExit) as stopped:
            train(words, case.script)
    printed = capsys.readouterr()
    assert "WARNING: sampling or measuring failed at step 1 (RuntimeError: no samples)" in printed.out
    assert stopped.value.code == 2 and "Traceback" not in printed.err
    assert f"its weights are safe there ({WEIGHTS[name][0]}" in printed.err
    assert "no samples (export_failed.txt says where); --resume_from_checkpoint=latest begins at step 2" in printed.err
    assert "in fail" in (out / export.FAILURE).read_text()
    assert all((out / part).exists() for part in WEIGHTS[name])
    assert checkpointing.completeness(out / "checkpoint-2") is None and not (out / "sample_grid.png").exists()

    train([*words, "--resume_from_checkpoint=latest"], case.script)
    assert (out / "sample_grid.png").is_file() and not (out / export.FAILURE).exists()
    for card in [out / "README.md", *out.glob("stage-*/README.md")]:
        found = run_code(card, monkeypatch, tmp_path)
        images = found["one_step"] if name == "ct" else [*found.get("images", [found.get("image")])]
        side = {"ct": 8}.get(name, 16 if "direct" in name else 32)
        assert {image.size for image in images} == {(side, side)}
        if "lora" in name or card.parent != out:
            assert type(found["pipe"]) is diffusers.StableDiffusionPipeline


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        (
            "org/teacher",
            {"revision": "abc", "variant": "fp16"},
            ("org/teacher", {"revision": "abc", "variant": "fp16"}),
        ),
        ("here.safetensors", {"revision": "abc", "variant": "fp16"}, ("{cwd}/here.safetensors", {})),
        ("a\nb\u2028c 'é' \"\U0001f600", {}, ("a\nb\u2028c 'é' \"\U0001f600", {})),
        ("here", {"revision": "abc", "cache_dir": "x"}, ("{cwd}/here", {})),
    ],
)
@pytest.mark.parametrize("is_sdxl", [False, True])
@pytest.mark.parametrize("vae", [None, "org/vae"])
def test_a_card_loads_what_the_run_loaded(tmp_path, monkeypatch, name, options, call, is_sdxl, vae):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here.safetensors").touch()
    seen = []

    class Loaded:
        def to(self, device):
            return self

    def note(self, name, dtype, **kwargs):
        seen.append((self, name, kwargs))
        return Loaded()

    plain, autoencoder = teachers.PLAIN[is_sdxl], diffusers.AutoencoderKL
    for cls in (plain, autoencoder):
        for method in ("from_pretrained", "from_single_file"):
            monkeypatch.setattr(cls, method, classmethod(note))
    exec(export.teacher_code(name, is_sdxl, ["LCMScheduler"], vae=vae, vae_revision="r", **options), {})
    expected = call[0].replace("{cwd}", str(tmp_path))
    assert seen[-1][:2] == (plain, expected)
    assert {key: value for key, value in seen[-1][2].items() if key != "vae"} == call[1]
    if vae:
        assert seen[0] == (autoencoder, vae, {"revision": "r"}) and isinstance(seen[-1][2]["vae"], Loaded)


def test_whatever_follows_the_weights_fails_in_one_sentence(tmp_path):
    (tmp_path / "unet").mkdir()
    accelerator = Accelerator(cpu=True)
    for error in (
        ValueError("first\nsecond"),
        UserError("--flag: a sentence"),
        OSError(28, "No space left on device"),
    ):
        with pytest.raises(UserError, match=r"weights are safe there \(unet\)") as caught:
            with export.after_weights(accelerator, tmp_path, 7):
                raise error
        assert "second" not in str(caught.value) and "begins at step 7" in str(caught.value)
    assert "ValueError: first" in (tmp_path / export.FAILURE).read_text()  # the first of all is kept
    with export.after_weights(accelerator, tmp_path, 7):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet"]
