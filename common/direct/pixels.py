"""How large a pipeline's images are, against what its call is asked for.

Many pipelines round: to multiples of 16 pixels, to 4 n + 1 frames, to a list of sizes of which one is made and resized
in the end. The noise of a sample has the size that is made, so that a resized image has lost its noise.
"""

from common.direct.pipelines import SCHEDULE_ARGUMENTS, call, public_kwargs
from common.direct.tasks import arguments
from common.errors import UserError

import torch


@torch.no_grad()
def made(pipeline, prompt, kwargs):
    """{"height", "width"}, of a video "num_frames" too: the size of what the VAE gives in a call with `kwargs`, before
    it is resized or cropped; {} for a pipeline without a VAE."""
    vae, shapes = getattr(pipeline, "vae", None), []
    if vae is None:
        return {}
    original, own = vae.decode, vars(vae).get("decode")

    def decode(*args, **options):
        answer = original(*args, **options)
        shapes.append((answer[0] if isinstance(answer, tuple) else answer.sample).shape[2:])
        return answer

    vae.decode = decode
    try:
        kwargs = {name: value for name, value in kwargs.items() if name not in SCHEDULE_ARGUMENTS}
        call(pipeline, [prompt], [0], "pt", **kwargs | {"num_inference_steps": 2})
    finally:
        del vae.decode
        if own:
            vae.decode = own
    names = ("num_frames", "height", "width")[-len(shapes[0]) :] if shapes else ()
    return dict(zip(names, shapes[0], strict=True)) if shapes else {}


def fit(pipeline, prompt, kwargs, size, notes):
    """Arguments with which a call makes images of `size`, {"height", "width"}: {}, or {"use_resolution_binning":
    False}, of which `notes` gets a sentence. UserError where it makes none of that size."""
    found = made(pipeline, prompt, kwargs | size)
    changed = {name: value for name, value in found.items() if size.get(name, value) != value}
    if not changed:
        return {}
    name, sizes = type(pipeline).__name__, f"{public_kwargs(found)} where it is asked for {public_kwargs(size)}"
    if kwargs.get("use_resolution_binning") is not False and "use_resolution_binning" in arguments(type(pipeline)):
        notes.append(f"a {name} makes {sizes}: the student's call has use_resolution_binning=False, which does not")
        unbinned = {"use_resolution_binning": False}
        return unbinned | fit(pipeline, prompt, kwargs | unbinned, size, notes)
    raise UserError(
        f"`pairs_dir`, `dataset_metadata_path`: a {name} makes {sizes}; images that were resized have lost their "
        "noise, make them in a size that it keeps"
    )


def rounded(pipeline, prompt, kwargs, notes):
    """The arguments among `kwargs` that the pipeline rounds, as it rounds them; of these `notes` gets a sentence."""
    found = made(pipeline, prompt, kwargs)
    changed = {name: value for name, value in found.items() if kwargs.get(name, value) != value}
    if changed:
        asked = public_kwargs({name: kwargs[name] for name in changed})
        name = type(pipeline).__name__
        notes.append(
            f"WARNING: a {name} makes {public_kwargs(changed)} where it is asked for {asked}; so are the pairs"
        )
    return changed
