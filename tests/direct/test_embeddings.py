"""Embeddings that are made once are what the pipelines make of every batch; what else is told of."""

import copy
import types

from common.direct import embeddings, pipelines, probes, student
from common.errors import UserError
from tests import tiny_pipelines

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

ACCELERATOR = types.SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, process_index=0, wait_for_everyone=lambda: None
)
PROMPTS = ["seven", "a handwritten three", "the number five", "seven"]
TEXT = CLIPTextModel(
    CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
)


def let_go(pipeline, folder, kwargs, **options):
    return embeddings.let_go(pipeline, PROMPTS, [kwargs], folder / "embeddings", ACCELERATOR, **options)


def latents(pipeline, prompts, kwargs):
    with torch.no_grad():
        return pipelines.call(pipeline, prompts, range(len(prompts)), **kwargs)


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_the_result_of_every_pipeline_stays(tmp_path, name, monkeypatch):
    """Prompts are encoded while the denoisers are on another device, for the call that these are asked with later."""
    pipeline, data = tiny_pipelines.make(name), types.SimpleNamespace(prompts=PROMPTS, call_kwargs=lambda _: {})
    pipeline.scheduler, _ = probes.student_scheduler(type(pipeline.scheduler), dict(pipeline.scheduler.config))
    given = {"teacher_kwargs": tiny_pipelines.KWARGS[name], "num_inference_steps": 2, "overrides": {}}
    kwargs, _ = student.student_kwargs(pipeline, data, **given)
    expected = latents(pipeline, PROMPTS[:3], kwargs)
    pipeline.text_encoder, networks = TEXT, pipelines.denoisers(pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers.DiffusionPipeline, "device", torch.device("cpu"))
        for part, network in networks.items():
            setattr(pipeline, part, copy.deepcopy(network).to("meta"))
        calls = student.possible_calls(pipeline, data, **given)
        assert len(embeddings._way(pipeline, PROMPTS, calls, "cpu").asked) == (2 if name == "HunyuanDiT" else 1)
        said = embeddings.let_go(pipeline, PROMPTS, calls, tmp_path / "embeddings", ACCELERATOR)
    for part, network in networks.items():
        setattr(pipeline, part, network)
    assert student.student_kwargs(pipeline, data, **given, calls=calls)[0] == kwargs  # asks for no others
    assert said.startswith("3 prompts are encoded once") and "let go: text_encoder, 0.00 of 0.00 GiB" in said
    assert pipeline.text_encoder is None
    torch.testing.assert_close(latents(pipeline, PROMPTS[:3], kwargs), expected)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SD1.5", {"guidance_scale": 4.0, "negative_prompt": "blur"}),
        ("Qwen-Image", {"true_cfg_scale": 4.0, "negative_prompt": "blur"}),
    ],
)
def test_a_teachers_guided_call_needs_no_encoder_either(tmp_path, name, kwargs):
    """For the real score: with the negative prompt beside each prompt, or asked for by itself."""
    pipeline = tiny_pipelines.make(name)
    kwargs |= {"num_inference_steps": 2, "height": 64, "width": 64}
    if name == "SD1.5":

        def encode_prompt(prompt, device, num_images_per_prompt, do_guidance, negative_prompt, **_):
            assert len(negative_prompt) == len(prompt)
            return tiny_pipelines.embed(prompt), tiny_pipelines.embed(negative_prompt)

        pipeline.encode_prompt = encode_prompt
    expected = latents(pipeline, PROMPTS[:3], kwargs)
    pipeline.text_encoder = TEXT
    said = embeddings.let_go(pipeline, [*PROMPTS, "blur"], [kwargs], tmp_path / "embeddings", ACCELERATOR)
    assert said.startswith("4 prompts are encoded once") and pipeline.text_encoder is None
    torch.testing.assert_close(latents(pipeline, PROMPTS[:3], kwargs), expected)
    other = latents(pipeline, PROMPTS[:3], kwargs | {"true_cfg_scale": 9.0, "guidance_scale": 9.0})
    assert (other - expected).abs().max() > 1e-3  # it guides


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_text_encoders_of_a_teacher_are_let_go_and_files_are_used_again(tmp_path, direct_teacher, kind, monkeypatch):
    def load():
        return pipelines.load_pipeline(direct_teacher(kind))

    kwargs = {"num_inference_steps": 2, "guidance_scale": 1.0}
    expected = latents(load(), PROMPTS[:3], kwargs)
    monkeypatch.setattr(embeddings, "PROMPTS_A_FILE", 2)
    pipeline = load()
    assert "3 prompts are encoded once" in let_go(pipeline, tmp_path, kwargs)
    assert not [name for name, part in pipeline.components.items() if "text_enc" in name and part is not None]
    torch.testing.assert_close(latents(pipeline, PROMPTS[:3], kwargs), expected, rtol=1e-4, atol=1e-5)  # of a batch
    with pytest.raises(UserError, match="embeddings that were not made: .'another'"):
        latents(pipeline, ["another"], kwargs)

    made = latents(pipeline, PROMPTS[:3], kwargs)
    files = sorted((tmp_path / "embeddings").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(files[1].read_bytes()[:-1])  # cut off
    again = load()
    let_go(again, tmp_path, kwargs)
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)] == [True, False]
    assert torch.equal(latents(again, PROMPTS[:3], kwargs), made)  # the same bytes
    for dtype in (torch.bfloat16, torch.float32):  # the same values in another one are made again
        let_go(load().to(dtype=torch.bfloat16).to(dtype=dtype), tmp_path, kwargs)
        assert load_file(files[0])["0.0"].dtype == dtype
    other = load()
    next(other.text_encoder.parameters()).data.add_(1)
    let_go(other, tmp_path, kwargs)
    assert not any(file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True))  # made again


def test_embeddings_that_were_made_in_advance_are_used_or_it_is_said_why_not(tmp_path, direct_teacher):
    kwargs, ready = {"num_inference_steps": 2, "guidance_scale": 1.0}, tmp_path / "ready"

    def load():
        return pipelines.load_pipeline(direct_teacher())

    for part in ((1, 2), (0, 2)):  # of a task of two, neither waits
        said = embeddings.make(load(), PROMPTS, kwargs, ready, "cpu", part)
        assert said == f"embeddings: {0 if part[0] else 3} of 3 prompts are encoded now, into {ready}"
    pipeline = load()
    said = let_go(pipeline, tmp_path, kwargs, ready=ready)
    assert f"GiB in {ready}; let go: text_encoder" in said and not (tmp_path / "embeddings").exists()
    expected = latents(load(), PROMPTS[:3], kwargs)
    torch.testing.assert_close(latents(pipeline, PROMPTS[:3], kwargs), expected, rtol=1e-4, atol=1e-5)  # of a batch

    (file,) = ready.iterdir()
    whole, other = file.read_bytes(), load()
    next(other.text_encoder.parameters()).data.add_(1)
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name[0] != "2"}, tmp_path / "less", metadata(file))
    less = (tmp_path / "less").read_bytes()
    for changed, network, options, reason in [
        (whole, other, kwargs, "they are of another text encoder"),
        (whole, load().to(dtype=torch.bfloat16), kwargs, "they are of another precision or student's call"),
        (whole, load(), kwargs | {"guidance_scale": 3.0}, "they are of another precision or student's call"),
        (less, load(), kwargs, "00000.safetensors lacks prompts"),
        (whole[:-1], load(), kwargs, "00000.safetensors is missing or damaged"),
    ]:
        file.write_bytes(changed)
        said = let_go(network, tmp_path, options, ready=ready)
        assert f"in {tmp_path / 'embeddings'}; those in {ready} are not used, {reason}; let go" in said
    file.write_bytes(whole)
    assert "they are of other prompts" in embeddings.let_go(
        load(), [*PROMPTS, "another"], [kwargs], tmp_path / "embeddings", ACCELERATOR, ready=ready
    )
    with pytest.raises(UserError, match="`save_embeddings`: training has no use for them, for a StableDiffusionPipe"):
        embeddings.make(pipeline, PROMPTS, kwargs, ready, "cpu")


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def padded(prompt=None, **kwargs):
    """As Qwen-Image's: rows as long as the longest prompt of a batch, and a mask where there is anything to hide."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    rows = [tiny_pipelines.embed([text], length=len(text.split())) for text in prompts]
    most = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    mask = torch.cat([pad(torch.ones(1, row.shape[1], dtype=torch.long), (0, most - row.shape[1])) for row in rows])
    rows = torch.cat([pad(row, (0, 0, 0, most - row.shape[1])) for row in rows])
    return rows, None if mask.all() else mask, None, None


def test_what_a_batch_pads_is_padded():
    ones, both = [padded([text]) for text in PROMPTS[:2]], padded(PROMPTS[:2])
    made = embeddings._merged(both, ones[0], [padded([text]) for text in PROMPTS[:3]])
    assert embeddings._same(made, padded(PROMPTS[:3])) and made[1].sum(1).tolist() == [1, 3, 3]
    for prompts in (PROMPTS[:1], PROMPTS[1:3]):  # alone, and of one length
        made = embeddings._merged(both, ones[0], [padded([text]) for text in prompts])
        assert embeddings._same(made, padded(prompts)) and made[1] is None
    alike = padded(PROMPTS[1:3])
    with pytest.raises(UserError, match="its shortest and longest prompt are equally long; pass 1"):
        embeddings._merged(alike, ones[1], [padded([text]) for text in PROMPTS[:2]])


@pytest.mark.parametrize("reason", ["depends on the others", "more than its prompt", "no encode_prompt", "has 0.0"])
def test_encoders_that_are_needed_stay_and_it_is_said(tmp_path, reason, monkeypatch):
    pipeline, kwargs = tiny_pipelines.make("SD1.5"), {"num_inference_steps": 2, "guidance_scale": 1.0}
    pipeline.text_encoder, encode = TEXT, pipeline.encode_prompt
    if reason.startswith("depends"):
        pipeline.encode_prompt = lambda prompt, *a, **k: (encode(prompt)[0] * len(prompt), None)
    elif reason.startswith("has"):
        monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    elif reason.startswith("more"):
        kwargs["negative_prompt_embeds"] = tiny_pipelines.embed(["no"])
    else:
        monkeypatch.setattr(embeddings, "hasattr", lambda *_: False, raising=False)
    said = let_go(pipeline, tmp_path, kwargs)
    assert said.startswith("note: text_encoder encode each batch and stay in memory") and reason in said
    assert pipeline.text_encoder is TEXT and not (tmp_path / "embeddings").exists()
    assert latents(pipeline, PROMPTS[:1], {"num_inference_steps": 1, "guidance_scale": 1.0}).isfinite().all()


def test_a_call_that_reads_its_encoder_keeps_it(tmp_path):
    pipeline, kwargs = tiny_pipelines.make("SD1.5"), {"num_inference_steps": 2, "guidance_scale": 1.0}
    pipeline.text_encoder = TEXT
    check = pipeline.check_inputs
    pipeline.check_inputs = lambda *args, **more: pipeline.text_encoder.config is None or check(*args, **more)
    said = let_go(pipeline, tmp_path, kwargs)
    assert "stay in memory, the call needs them: 'NoneType' object has no" in said and pipeline.text_encoder is TEXT
