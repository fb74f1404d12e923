"""The other side of llava.ts: makes a LLaVA in every layout it has been saved in, or loads what we exported; logits of both."""
import json
import os
import shutil
import sys
import warnings

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration

command, folder, tokenizer, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
warnings.simplefilter("ignore")


def logits(model, pixels):
    c = model.config
    rows = c.image_seq_length
    spliced = [t for i in ids for t in ([c.image_token_index] * rows if i == -200 else [i])]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([spliced]), pixel_values=pixels)
    return out.logits[0].float().contiguous()


def official_names(state):
    """transformers' names in memory -> those of the official LLaVA"""
    vision = "model.vision_tower.vision_tower.vision_model."
    pairs = [
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.vision_tower.vision_model.", vision),
        ("model.vision_tower.", vision),
        ("lm_head.", "lm_head."),
    ]
    found = {name: next(p for p in pairs if name.startswith(p[0])) for name in state}
    return {to + name[len(old):]: state[name] for name, (old, to) in found.items()}


def make():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=520, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5, pad_token_id=0, initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=510, image_seq_length=16)
    model = LlavaForConditionalGeneration(config).eval()
    names = ["saved", "sharded", "memory", "official"]
    model.save_pretrained(f"{folder}/saved")
    model.save_pretrained(f"{folder}/sharded", max_shard_size="100KB")
    state = model.state_dict()
    for name in ("memory", "official"):
        shutil.copytree(f"{folder}/saved", f"{folder}/{name}")
        os.remove(f"{folder}/{name}/model.safetensors")
    torch.save(state, f"{folder}/memory/pytorch_model.bin")
    torch.save(official_names(state), f"{folder}/official/pytorch_model.bin")
    llava = text.to_dict() | {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    }
    json.dump(llava, open(f"{folder}/official/config.json", "w"))
    clip = {"model_type": "clip", "vision_config": vision.to_dict()}
    os.makedirs(f"{folder}/clip")
    json.dump(clip, open(f"{folder}/clip/config.json", "w"))
    for name in names:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{tokenizer}/{file}", f"{folder}/{name}/{file}")
    pixels = load_file(f"{folder}/pixels.safetensors")["pixels"]
    save_file({"logits": logits(model, pixels)}, f"{folder}/logits.safetensors")


def load():
    model, info = LlavaForConditionalGeneration.from_pretrained(
        f"{folder}/hf", dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: sorted(names)[:4] for kind, names in info.items() if names}
    assert not wrong, f"expected every tensor in its place, got {wrong}"
    image = model.config.image_token_index
    token = AutoTokenizer.from_pretrained(f"{folder}/hf").convert_tokens_to_ids("<image>")
    assert token == image, f"expected <image> to be token {image}, got {token}"
    processor = AutoProcessor.from_pretrained(f"{folder}/hf")
    side = model.config.vision_config.image_size
    batch = processor(
        text="USER: <image>\nWhat? ASSISTANT:", images=torch.zeros(3, side + 9, side), return_tensors="pt"
    )
    rows = int((batch["input_ids"] == image).sum())
    assert rows == model.config.image_seq_length, f"expected {model.config.image_seq_length} places, got {rows}"
    pixels = load_file(f"{folder}/pixels.safetensors")["pixels"]
    assert batch["pixel_values"].shape == pixels.shape, f"expected pixels {pixels.shape}, got {batch['pixel_values'].shape}"
    save_file({"logits": logits(model.eval(), pixels)}, f"{folder}/logits.safetensors")


{"make": make, "load": load}[command]()
