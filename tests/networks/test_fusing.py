"""A user's LoRA as a part of the teacher: what stock diffusers fuses, and what is refused."""

import train_direct_distill as direct
from common.errors import UserError
from common.networks import fusing, lora, teachers
from common.results import export
from tests import tiny_pipelines
from tests.cases import one_sentence, train
from tests.made import ask

import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, UNet2DConditionModel


def write_lora(folder, unet, seed=0):
    """The files of a LoRA on a copy of the U-Net that changes what it gives: (diffusers', kohya's)."""
    copy = UNet2DConditionModel.from_config(unet.config)
    lora.add_lora(copy, 4, 2.0)
    torch.manual_seed(seed)
    for parameter in lora.lora_parameters(copy):
        torch.nn.init.normal_(parameter, std=0.3)
    return lora.save_lora(folder, copy)


@pytest.fixture
def files(teacher, tmp_path):
    return write_lora(tmp_path / "style", teachers.load_teacher(teacher()).unet)


def test_a_teacher_has_its_loras_in_its_weights(teacher, files, tmp_path):
    plain = teachers.load_teacher(teacher())
    other = write_lora(tmp_path / "other", plain.unet, seed=1)[1]
    stock = StableDiffusionPipeline.from_pretrained(teacher(), safety_checker=None)
    for file, scale in ((files[0], 0.5), (other, 1.0)):
        stock.load_lora_weights(file.parent, weight_name=file.name)
        stock.fuse_lora(lora_scale=scale)
        stock.unload_lora_weights()
    text = f"{files[0]}:0.5, {other}"
    fused = teachers.load_teacher(teacher(), lora=text)
    assert not lora.lora_layers(fused.unet) and not any(p.requires_grad for p in fused.unet.parameters())
    expected, found, before = (dict(p.unet.named_parameters()) for p in (stock, fused, plain))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)  # the same sums
    assert (found["mid_block.resnets.0.conv1.weight"] - before["mid_block.resnets.0.conv1.weight"]).norm() > 0.1

    student = UNet2DConditionModel.from_config(plain.unet.config)
    kept = [p.clone() for p in student.parameters()]
    pipeline = teachers.load_teacher(teacher(), lora=text, unet=student)  # as an export puts it together
    assert pipeline.unet is student and all(map(torch.equal, student.parameters(), kept))

    place = {}
    snippet = export.teacher_code(teacher(), False, [], lora=text)
    exec(snippet.replace('.to("cuda")', "").replace("float16", "float32"), place)
    for name, value in place["pipe"].unet.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_text_encoders_are_fused_too(teacher, tmp_path):
    plain = teachers.load_teacher(teacher())
    layers = {}
    for name, module in plain.text_encoder.named_modules():
        if name.endswith("q_proj"):
            rows, columns = module.weight.shape
            layers |= {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    text = str(tmp_path)
    teachers.read_teacher_config(teacher(), lora=text)
    fused = teachers.load_teacher(teacher(), lora=text)
    pairs = zip(plain.text_encoder.named_parameters(), fused.text_encoder.parameters(), strict=True)
    changed = {name for (name, before), after in pairs if not torch.equal(before, after)}
    assert changed and all("q_proj.weight" in name for name in changed)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("/no/such.safetensors", "0 LoRA files there; give FILE.safetensors or FILE.safetensors:SCALE"),
        ("{file}:0", "its scale is 0"),
        ("{teacher}/unet", "it is no LoRA that a StableDiffusionPipeline takes"),
        ("{damaged}", "it cannot be read"),
        ("{pickle}", "a .bin file is a pickle"),
        ("{foreign}", "it belongs to another model, its unet.*; name the teacher it was made for"),
    ],
)
def test_what_is_no_lora_of_the_teacher_is_refused_without_weights(teacher, files, tmp_path, text, sentence):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(files[0].read_bytes()[:-9])
    foreign = write_lora(tmp_path / "foreign", tiny_pipelines.make("SDXL").unet)[0]
    places = {"file": files[0], "teacher": teacher(), "damaged": damaged, "pickle": "x.bin", "foreign": foreign}
    with pytest.raises(UserError, match=f"`teacher_lora`=.*{sentence}"):
        teachers.read_teacher_config(teacher(), lora=text.format_map(places))


def test_pipelines_without_loras_and_texts(files):
    with pytest.raises(UserError, match="a PixArtAlphaPipeline takes no LoRA in diffusers"):
        fusing.check(str(files[0]), PixArtAlphaPipeline, {})
    assert fusing.parse(None) == fusing.parse("") == []
    assert fusing.parse(f"{files[0]}:-0.5") == [(files[0], -0.5)] and fusing.parse(files[0].parent) == [
        (files[0], 1.0)
    ]
    assert fusing.identity(f"{files[0]}") != fusing.identity(f"{files[0]}:0.5")


def test_pairs_and_their_student_have_the_same_teacher(tmp_path, direct_teacher, prompts_file, direct_flags, capsys):
    """generate_pairs and direct distillation with a LoRA; without it, the pairs are another teacher's."""
    file, _ = write_lora(tmp_path / "style", teachers.load_teacher(direct_teacher()).unet)
    ask(
        tmp_path / "pairs",
        direct_teacher(),
        prompts_file,
        num_pairs=8,
        num_inference_steps=4,
        teacher_lora=file,
        save_embeddings=True,
    )
    own = {"pairs_dir": tmp_path / "pairs", "max_train_steps": 1, "num_held_out": 2, "train_batch_size": 2}
    own |= {"skip_pairs_check": True}
    said = one_sentence(capsys, train, direct_flags(tmp_path / "out", **own), direct)
    assert "made with another --teacher_lora, or with none; pass the same one" in said
    adapters = {"lora_rank": 4, "lora_alpha": 2, "lora_target_modules": ",".join(lora.TARGET_MODULES)}
    words = direct_flags(tmp_path / "new", **own, **adapters, teacher_lora=file, init_lora=file.parent)
    train(words, direct)
    assert not (tmp_path / "new" / "embeddings").exists()  # those beside the pairs are its teacher's
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"weight_name='{file.name}')\npipe.fuse_lora(lora_scale=1)\npipe.unload_lora_weights()" in card
