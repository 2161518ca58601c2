"""What half precision rounds away of a consistency loss, on your teacher:

    python tests/benchmarks/precision.py --pretrained_teacher_model=demo/teacher_parity \\
        --train_shards_path_or_url="demo/shards_parity/train/{00000..00007}.tar" --resolution=16

One batch, float32 as the truth. Of the difference prediction - target, in which all that is learnt is: the share that
rounding makes, |difference in half precision - difference| / |difference|, of LCM at four timesteps and of TSCD's last
stage; and the cosine of the loss's gradient with float32's. Each with the end layers in half precision too, and with
them in float32 (`--float32_end_layers`, the scripts' default). With --learning_rate: what so many updates of a LoRA
move its output, as a cosine with what they move it in float32. With --consistency_model, the folder of a result of
train_cm_ct_unconditional.py, the same of iCT between neighbouring noise levels at sigma 1.27.

Prints markdown tables. On a GPU it runs there. Left out: the VAE and text encoders, which compute in float32 here.
"""

import argparse
import contextlib
import copy
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.ct import consistency  # noqa: E402
from common.data.images import decode_image_text  # noqa: E402
from common.data.shards import expand_shards  # noqa: E402
from common.data.stream import TrainingData  # noqa: E402
from common.losses import distance  # noqa: E402
from common.networks import encoders, lora, performance, teachers  # noqa: E402
from common.run import screen  # noqa: E402
from common.schedules import alpha_sigma, append_dims, boundary_scalings, to_eps, to_x_0  # noqa: E402
from common.solvers import DDIMSolver  # noqa: E402
from common.tscd.solver import TrajectorySolver  # noqa: E402

import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = [(name, ends) for name in DTYPES for ends in (False, True)]
GRID_STEP, GUIDANCE = 20, 4.0  # of LCM's 50 points; w
TIMESTEPS = (99, 499, 879, 999)
SIGMA, LEVELS = 1.27, 1281


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pretrained_teacher_model", required=True, help="folder, hub name, or one .safetensors file")
    add("--train_shards_path_or_url", required=True, help="tars or an image folder, with captions")
    add("--resolution", type=int, default=512)
    add("--batch_size", type=int, default=16)
    add("--learning_rate", type=float, help="of a LoRA: what its --updates move")
    add("--updates", type=int, nargs="+", default=[1, 20, 200], help="200 take minutes")
    add("--lora_rank", type=int, default=64)
    add("--consistency_model", help="a result of train_cm_ct_unconditional.py without classes")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Batch:
    """Images, captions and noise of one batch, and a teacher in float32."""

    def __init__(self, args, device):
        self.device, self.args = device, args
        torch.manual_seed(args.seed)
        name = args.pretrained_teacher_model
        self.config = teachers.read_teacher_config(name)
        decode = functools.partial(decode_image_text, resolution=args.resolution)
        shards = expand_shards(args.train_shards_path_or_url)
        batch = next(iter(TrainingData(shards, decode, batch_size=args.batch_size, seed=args.seed, num_lanes=1)))
        self.images = batch["images"].to(device)
        pipeline = teachers.load_teacher(name).to(device)
        draw = torch.Generator(device).manual_seed(args.seed)
        self.latents = encoders.encode_batch(pipeline.vae, batch, draw, 1)
        time_ids = encoders.time_ids(batch, args.resolution)
        self.cond = encoders.conditioning(pipeline, batch["captions"], time_ids)
        self.both = encoders.concat_conditioning(self.cond, encoders.uncond_conditioning(pipeline))
        self.noise = torch.randn(self.latents.shape, generator=draw, device=device)
        scheduler = DDPMScheduler.from_config(self.config["scheduler"])
        self.alpha, self.sigma = (x.to(device) for x in alpha_sigma(scheduler.alphas_cumprod))
        self.prediction_type = scheduler.config.prediction_type
        self.unet = pipeline.unet.eval()

    def noisy(self, timesteps):
        alpha, sigma = (append_dims(x[timesteps], 4) for x in (self.alpha, self.sigma))
        return alpha * self.latents + sigma * self.noise

    @torch.no_grad()
    def guided(self, noisy_latents, timesteps):
        """The teacher's guided output, in float32."""
        output = self.unet(noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2), **self.both).sample
        cond, uncond = output.chunk(2)
        return cond + GUIDANCE * (cond - uncond)


def lcm_difference(batch, unet, timesteps, autocast):
    """prediction - target of LCM, (B, 4, h, w): f(z_t, t) - f(z_{t-k}, t-k), with gradients of the first."""
    earlier = (timesteps - GRID_STEP).clamp(min=0)
    z_t = batch.noisy(timesteps)
    place = {
        t: [append_dims(x[ts], 4) for x in (batch.alpha, batch.sigma)] for t, ts in enumerate((timesteps, earlier))
    }
    guided = batch.guided(z_t, timesteps)
    x_0, eps = (convert(guided, z_t, *place[0], batch.prediction_type) for convert in (to_x_0, to_eps))
    z_prev = DDIMSolver(batch.alpha, batch.sigma).step(x_0, eps, earlier)
    sides = []
    for side, (z, ts) in enumerate(((z_t, timesteps), (z_prev, earlier))):
        with autocast(), contextlib.nullcontext() if side == 0 else torch.no_grad():
            output = unet(z, ts, **batch.cond).sample
        c_skip, c_out = (append_dims(c, 4) for c in boundary_scalings(ts))
        sides.append(c_skip * z + c_out * to_x_0(output.float(), z, *place[side], batch.prediction_type))
    return sides[0] - sides[1]


def tscd_difference(batch, unet, timesteps, autocast):
    """prediction - target of TSCD's last stage: both jump to the data's end."""
    solver = TrajectorySolver(batch.alpha, batch.sigma, batch.prediction_type)
    earlier, end = (timesteps - 25).clamp(min=0), torch.zeros_like(timesteps)
    z_t = batch.noisy(timesteps)
    z_prev = solver.jump(batch.guided(z_t, timesteps), z_t, timesteps, earlier)
    with autocast():
        output = unet(z_t, timesteps, **batch.cond).sample
    with autocast(), torch.no_grad():
        target_output = unet(z_prev, earlier, **batch.cond).sample
    return solver.jump(output, z_t, timesteps, end) - solver.jump(target_output, z_prev, earlier, end)


def ict_difference(batch, unet, sigmas, autocast):
    """prediction - target of iCT between two of 1,281 noise levels."""
    levels = consistency.karras_sigmas(LEVELS).float().to(batch.device)
    index = (levels[None] - sigmas[:, None]).abs().argmin(1).clamp(min=1)
    images = torch.nn.functional.interpolate(batch.images.float() / 127.5 - 1, unet.config.sample_size, mode="area")
    noise = torch.randn(images.shape, generator=torch.Generator(batch.device).manual_seed(1), device=batch.device)
    f = functools.partial(consistency.consistency_function, sigma_min=0.002, sigma_data=0.5)
    f = functools.partial(f, noise_precond_type="cm", input_precond_type="cm")
    with autocast():
        prediction = f(unet, images + append_dims(levels[index], 4) * noise, levels[index], None)
    with autocast(), torch.no_grad():
        lower = levels[index - 1]
        target = f(unet, images + append_dims(lower, 4) * noise, lower, None)
    return prediction - target


def measure(batch, unet, difference, times):
    """{(dtype, ends): ([share of each time], cosine of the gradient over all of them)}."""

    def run(network, autocast):
        found = []
        network.zero_grad(set_to_none=True)
        for time in times:
            one = difference(batch, network, torch.full((len(batch.latents),), time, device=batch.device), autocast)
            distance(one, torch.zeros_like(one), "huber", 0.001).backward()
            found.append(one.detach().double())
        return found, torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])

    unet = copy.deepcopy(unet).requires_grad_(True)
    exact, exact_gradient = run(unet, contextlib.nullcontext)
    rows = {}
    for name, ends in KINDS:
        network = copy.deepcopy(unet)
        if ends:
            performance.float32_ends(network)
        autocast = functools.partial(torch.autocast, batch.device.type, dtype=DTYPES[name])
        rounded, gradient = run(network, autocast)
        shares = [((a - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True)]
        rows[name, ends] = shares, torch.cosine_similarity(gradient, exact_gradient, dim=0).item()
    return rows


def lora_moves(batch, learning_rate, rank, updates):
    """{(dtype, ends): [cosine of the move of the output after each of `updates`]}, of one LoRA trained in float32."""
    unet = copy.deepcopy(batch.unet)
    lora.add_lora(unet, rank, rank)
    parameters = list(lora.lora_parameters(unet))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    timesteps = torch.full((len(batch.latents),), 499, device=batch.device)
    z_t, start, moves = batch.noisy(timesteps), {}, {kind: [] for kind in KINDS}

    @torch.no_grad()
    def outputs():
        found = {None: unet(z_t, timesteps, **batch.cond).sample.double()}
        for name, ends in KINDS:  # the base in half precision, the adapters in float32, as in the scripts
            network = copy.deepcopy(unet).to(DTYPES[name])
            for half, full in zip(lora.lora_parameters(network), parameters, strict=True):
                half.data = full.data.clone()
            if ends:
                performance.float32_ends(network)
            with torch.autocast(batch.device.type, dtype=DTYPES[name]):
                found[name, ends] = network(z_t, timesteps, **batch.cond).sample.double()
        return found

    start = outputs()
    for update in range(1, max(updates) + 1):
        index = torch.randint(1, 51, (len(batch.latents),), device=batch.device) * GRID_STEP - 1
        one = lcm_difference(batch, unet, index, contextlib.nullcontext)
        distance(one, torch.zeros_like(one), "huber", 0.001).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update in updates:
            now = outputs()
            exact = (now[None] - start[None]).flatten()
            for kind in KINDS:
                cosine = torch.cosine_similarity((now[kind] - start[kind]).flatten(), exact, dim=0)
                moves[kind].append(cosine.item())
    return moves


def table(title, heads, rows):
    print(f"\n| {title} | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    for (name, ends), values in rows.items():
        label = f"{name}, end layers float32" if ends else name
        print(f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


def main(args):
    screen.quiet_libraries()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch = Batch(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    heads = [*(f"t = {t}" for t in TIMESTEPS), "cosine of the gradient"]
    results = {}
    for title, difference in (("LCM", lcm_difference), ("TSCD, k = 1", tscd_difference)):
        results[title] = measure(batch, batch.unet, difference, TIMESTEPS)
        table(title, heads, {kind: [*shares, cosine] for kind, (shares, cosine) in results[title].items()})
    if args.consistency_model:
        unet = UNet2DModel.from_pretrained(args.consistency_model, subfolder="unet").to(batch.device).eval()
        results["iCT"] = measure(batch, unet, ict_difference, [SIGMA])
        heads = [f"sigma = {SIGMA}", "cosine of the gradient"]
        table("iCT", heads, {kind: [*shares, cosine] for kind, (shares, cosine) in results["iCT"].items()})
    if args.learning_rate:
        results["LoRA"] = lora_moves(batch, args.learning_rate, args.lora_rank, args.updates)
        table(f"a LoRA at {args.learning_rate:g}: cosine", [f"{n} updates" for n in args.updates], results["LoRA"])
    return results


if __name__ == "__main__":
    main(parse_args())
