"""How well images fit their prompts: CLIP score, and the classes that prompts name."""

import re

from common.results.metrics import image_features

import torch


def clip_score(network, images, prompts, batch_size=64):
    """CLIP score: the mean of 100 cos(image embedding, prompt embedding) (Hessel et al. 2021, arXiv 2104.08718).

    As most tables report it: times 100, not times 2.5, negative cosines kept. Prompts longer than CLIP's text length
    are cut there.

    network: a CLIP from `load_feature_network`; images: uint8 (N, 3, H, W); prompts: N strings. Returns a float.
    """
    if network.tokenizer is None:
        raise ValueError(f"{network.name} is a {type(network.model).__name__}, which does not read text: take a CLIP")
    image_embeds = image_features(network, images, batch_size)
    distinct = list(dict.fromkeys(prompts))
    batches = (distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size))
    text_embeds = torch.cat([_text_features(network, batch) for batch in batches])
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    text_embeds = text_embeds[[rows[prompt] for prompt in prompts]]
    return 100 * torch.cosine_similarity(image_embeds.double(), text_embeds.double()).mean().item()


def prompt_labels(id2label, prompts):
    """The class that each prompt names: N prompts -> N class indices.

    A prompt names a class where the label appears in it as a whole word or phrase, in either case; of a label with
    synonyms ("tench, Tinca tinca") any one. id2label: a classifier's `config.id2label`. ValueError: a prompt names no
    class or several.
    """
    patterns = {
        int(index): re.compile("|".join(rf"(?<!\w){re.escape(word.strip())}(?!\w)" for word in label.split(",")), re.I)
        for index, label in id2label.items()
    }

    def label_of(prompt):
        named = [index for index, pattern in patterns.items() if pattern.search(prompt)]
        if len(named) != 1:
            names = ", ".join(str(id2label[index]) for index in named) or "none"
            raise ValueError(f"a prompt must name exactly one of the classifier's classes; '{prompt}' names {names}")
        return named[0]

    found = {prompt: label_of(prompt) for prompt in dict.fromkeys(prompts)}
    return [found[prompt] for prompt in prompts]


def _text_features(network, prompts):
    length = network.model.config.text_config.max_position_embeddings
    tokens = network.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).to(network.model.device)
    with torch.no_grad():
        output = network.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return (output if torch.is_tensor(output) else output.pooler_output).float().cpu()
