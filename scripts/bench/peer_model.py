"""AlignGPT in PyTorch and transformers: the whole training step, and decoding, with weights from our own checkpoint.

Sequence of a sample: [BOS][alignment row][picture rows][text]; the loss is on the text. Phase 1 trains projector and
alignment table (row of the level); phase 2 trains language model, projector and gate, the table is frozen.
"""
import json
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from peer_kernels import integers, values
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

VISION = "vision_tower.vision_tower.vision_model."
LLAMA_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings bos_token_id eos_token_id"
).split()


def read_json(*path):
    with open(os.path.join(*path)) as f:
        return json.load(f)


class AlignModel(nn.Module):
    def __init__(self, folder, phase):
        super().__init__()
        config = read_json(folder, "config.json")
        vision = CLIPVisionConfig(**read_json(folder, "vision_tower", "config.json")["vision_config"])
        # LLaVA takes hidden_states[-2]; what lies above is not computed here, and not by us
        vision.num_hidden_layers += 1 + config["mm_vision_select_layer"]
        llama = LlamaConfig(**{k: config[k] for k in LLAMA_KEYS}, use_cache=False)
        vision._attn_implementation = llama._attn_implementation = "sdpa"
        width, levels = llama.hidden_size, config["n_indicators"]
        patches = (vision.image_size // vision.patch_size) ** 2
        self.vision = CLIPVisionModel(vision)
        self.lm = LlamaForCausalLM(llama)
        self.mm_projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.indicator_embs = nn.Parameter(torch.empty(levels, width))
        self.gate = nn.Sequential(nn.Linear(patches, 256), nn.GELU(), nn.Linear(256, levels - 1))
        self.phase = phase
        self.load(os.path.join(folder, "model.safetensors"))
        self.freeze()

    def load(self, file):
        """Copies tensor by tensor; every parameter must be in the file."""
        renamed = {"vision.": VISION, "lm.": "", "gate.": "gated_weight_layer.mlp."}
        with safe_open(file, "pt") as f, torch.no_grad():
            for name, p in self.named_parameters():
                for ours, theirs in renamed.items():
                    if name.startswith(ours):
                        name = theirs + name[len(ours) :].removeprefix("vision_model.")
                name = "align_indicators." + name if name == "indicator_embs" else name
                p.copy_(f.get_tensor(name))

    def freeze(self):
        self.train()
        self.vision.eval().requires_grad_(False)
        self.lm.requires_grad_(self.phase == 2)
        self.gate.requires_grad_(self.phase == 2)
        self.indicator_embs.requires_grad_(self.phase == 1)

    def cast(self, dtype):
        """Parameters only: the rotary frequencies stay f32, as they are on our side."""
        for p in self.parameters():
            p.data = p.data.to(dtype)
        return self

    @torch.no_grad()
    def encode(self, pixels):
        return self.vision(pixels).last_hidden_state[:, 1:]

    def embed(self, features, ids, mask, levels):
        """features [B, P, D], ids [B, L] padded on the right, mask [B, L] -> [B, 2 + P + L, H]"""
        table = self.lm.get_input_embeddings()
        rows, text = self.mm_projector(features), table(ids)
        if self.phase == 1:
            align = self.indicator_embs[levels]
        else:
            mean = text.mean(1) if mask is None else (text * mask[..., None]).sum(1) / mask.sum(1)[:, None]
            weights = self.gate(torch.einsum("bph,bh->bp", rows, mean.to(rows.dtype))).softmax(-1)
            align = weights.to(self.indicator_embs.dtype) @ self.indicator_embs[:-1] + self.indicator_embs[-1]
        bos = table(torch.ones(len(ids), 1, dtype=torch.long))
        return torch.cat((bos, align[:, None].to(bos.dtype), rows.to(bos.dtype), text), 1)

    def forward(self, features, ids, mask, levels, rows, targets):
        """rows: flat indices of the rows that predict a label (logits on text positions), or None (on all)"""
        x = self.embed(features, ids, mask, levels)
        hidden = self.lm.model(inputs_embeds=x).last_hidden_state
        if rows is None:
            logits = self.lm.lm_head(hidden)[:, -(ids.shape[1] + 1) : -1]
        else:
            logits = self.lm.lm_head(hidden.reshape(-1, hidden.shape[-1])[rows])
        return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), targets)


class Step:
    """One training step of `lengths` texts, each behind a picture.

    dtype: f32 | autocast (f32 weights) | bf16 (weights, gradients and moments); logits: all | text positions
    """

    def __init__(self, folder, phase, dtype, compiled, logits, lengths, lr):
        low = torch.bfloat16
        self.auto = lambda: torch.autocast("cpu", low, enabled=dtype == "autocast")
        self.model = AlignModel(folder, phase).cast(low if dtype == "bf16" else torch.float32)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
        self.encode, self.forward = self.model.encode, self.model
        if compiled:
            self.encode, self.forward = torch.compile(self.model.encode), torch.compile(self.model)
        self.batch(lengths, logits, low if dtype == "bf16" else torch.float32)
        self.losses = []

    def batch(self, lengths, logits, dtype):
        size, n, longest = self.model.vision.config.image_size, len(lengths), max(lengths)
        vocab = self.model.lm.config.vocab_size
        self.pixels = values((n, 3, size, size), 20).to(dtype)
        packed = integers(sum(lengths), 21, 3, vocab)
        ids = torch.zeros(n, longest, dtype=torch.long)
        labels = torch.full((n, longest), -100)
        for b, part in enumerate(packed.split(lengths)):
            ids[b, : len(part)] = labels[b, : len(part)] = part
        mask = labels >= 0
        start = 1 + (size // self.model.vision.config.patch_size) ** 2  # the row before the first text row
        at = torch.arange(n)[:, None] * (start + 1 + longest) + start + torch.arange(longest)
        even = min(lengths) == longest
        only_text = logits == "text"
        self.arguments = (
            ids,
            None if even else mask.to(dtype),
            integers(n, 22, 0, len(self.model.indicator_embs)),
            at[mask] if only_text else None,
            packed if only_text else labels.reshape(-1),
        )

    def run(self):
        with self.auto():
            loss = self.forward(self.encode(self.pixels), *self.arguments)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())

    def values(self):
        return {"losses": self.losses}


class Decode:
    """Greedy continuation of one text prompt by transformers' generate with a static cache."""

    def __init__(self, folder, dtype, prompt, tokens):
        self.lm = AlignModel(folder, 2).cast(torch.bfloat16 if dtype == "bf16" else torch.float32).lm.eval()
        text = integers(prompt - 1, 31, 3, self.lm.config.vocab_size)
        self.ids = torch.cat((torch.ones(1, dtype=torch.long), text))[None]
        self.options = dict(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            cache_implementation="static",
            pad_token_id=0,
            eos_token_id=None,
        )
        self.out = None

    def run(self):
        with torch.no_grad():
            self.out = self.lm.generate(self.ids, attention_mask=torch.ones_like(self.ids), **self.options)

    def values(self):
        with torch.no_grad():
            logits = self.lm(self.ids).logits[0, -1]
        return {"ids": self.out[0, self.ids.shape[1] :].tolist(), "logits": logits}


KINDS = {"step": Step, "decode": Decode}
