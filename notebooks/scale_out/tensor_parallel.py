"""Tensor parallel inference: every process holds a slice of each matrix, and all of them work on every token.

    torchrun --nproc_per_node N tensor_parallel.py --model MODEL --output FILE

N has to divide the key-value heads of the model. Without GPUs the processes talk through gloo.
"""

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--text", default="The for statement is used to")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, tp_plan="auto").eval()
inputs = tokenizer(args.text, return_tensors="pt").to(model.device)
with torch.inference_mode():
    logits = model(**inputs).logits
answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
if torch.distributed.get_rank() == 0:
    layer = model.model.layers[0]
    slices = {
        name: torch.tensor(layer.get_submodule(name).weight.to_local().shape)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    save_file({"logits": logits.float().cpu().contiguous(), "answer": answer.cpu(), **slices}, args.output)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
