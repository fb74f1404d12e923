"""The other side of peft.ts: loads our adapter with PEFT, makes one of its own, writes the logits of both."""
import json
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

llm, folder, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
warnings.simplefilter("error")  # PEFT only warns about adapter keys that are missing or left over


def base():
    return AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(ids).logits[0].float().contiguous()


plain = logits(base())
ours = PeftModel.from_pretrained(base(), f"{folder}/ours")
held = {n.replace(".default.", ".") for n, _ in ours.named_parameters() if "lora_" in n}
files = set(load_file(f"{folder}/ours/adapter_model.safetensors"))
assert held == files, f"expected PEFT to hold the tensors of the file, differing: {sorted(held ^ files)[:4]}"

torch.manual_seed(3)
config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
theirs = get_peft_model(base(), config).eval()
for name, p in theirs.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.3)
theirs.save_pretrained(f"{folder}/theirs")
save_file(
    {"plain": plain, "ours": logits(ours), "theirs": logits(theirs)}, f"{folder}/logits.safetensors"
)
