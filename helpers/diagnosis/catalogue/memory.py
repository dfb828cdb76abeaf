"""Too little memory or disk."""

from helpers.diagnosis.catalogue.base import HF_DOCS, TRANSFORMERS, Entry, L, P

ENTRIES = (
    Entry(
        "cuda-out-of-memory",
        "memory",
        "The GPU's memory is full",
        (
            P(
                "OutOfMemoryError|RuntimeError|AcceleratorError",
                r"(?:CUDA|HIP|XPU) out of memory|(?:CUDA|HIP) error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|MPS backend out of memory",
            ),
        ),
        "Weights, KV cache, activations and what an earlier cell still holds exceed the card. Only `reserved but unallocated` is fragmentation.",
        "Restart the kernel first. Then: fewer bits, batch 1, shorter context, gradient checkpointing.",
        "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
        code="del model; import gc; gc.collect(); torch.cuda.empty_cache()\n# fragmentation only: PYTORCH_ALLOC_CONF=expandable_segments:True, before torch is imported",
        recorded="PyTorch issue 16417, with the newer wording of later comments",
        where="compiled torch vllm",
    ),
    Entry(
        "ram-exhausted",
        "memory",
        "The computer's memory cannot give this much",
        (
            P("RuntimeError", r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"),
            P("MemoryError|ArrayMemoryError|_ArrayMemoryError", r""),
        ),
        "One tensor alone is larger than what is free: float32 instead of bfloat16, a batch or context too long, or a wrong shape.",
        "Compare the bytes in the message with what you expected; predict a model's size before loading it.",
        "https://huggingface.co/docs/transformers/big_models",
        code="from helpers import memory\nprint(memory.predict(config, bits=4, group_size=64).total / 1e9, 'GB of', memory.free_ram() / 1e9)",
        where="compiled numpy",
    ),
    Entry(
        "process-killed",
        "memory",
        "The system killed the process: out of memory",
        (
            P("CalledProcessError|ProcessExitedException", r"SIGKILL|exit (status|code) (-9|137)"),
            P("ChildFailedError", r"exitcode *: -9\b|Signal 9 \(SIGKILL\)"),
            P("DeadKernelError", r"(?i)kernel died"),
            L(
                r"(?i:kernel (appears to have|has) died)|^(?:[\w./-]+: (?:line \d+: *\d+ +)?|\[\d+\] +[-+]? *\d+ +)?[Kk]illed(?: {2,}\S.*)?$|Out of memory: Killed process|OOMKilled|oom_kill event|exit(ed with)? code:? 137|exitcode *: -9 |Signal 9 \(SIGKILL\)|Your session crashed after using all available RAM"
            ),
        ),
        "Linux ends the largest process when memory runs out; Python cannot say anything any more. No traceback is the sign.",
        "Use a smaller model or fewer bits, load in bfloat16, close other notebooks: each kernel keeps its models.",
        "https://github.com/nteract/papermill/issues/478",
        code="python -m helpers doctor   # what is free, and what the course needs",
        where="anywhere",
    ),
    Entry(
        "disk-full",
        "memory",
        "The disk is full",
        (P("OSError|SafetensorError|RuntimeError", r"No space left on device|[Dd]isk quota exceeded"),),
        "Checkpoints and the hub's cache add up: a 7B model is 14 GB in 16 bits, and downloads stay.",
        "Look what lies in the cache; move it to a larger disk.",
        f"{HF_DOCS}/huggingface_hub/guides/manage-cache",
        code="hf cache ls\nexport HF_HOME=/larger/disk/hf COURSE_CACHE=/larger/disk/course",
        where="compiled python own anywhere",
    ),
    Entry(
        "modules-on-cpu-or-disk",
        "memory",
        "A quantized model that does not fit the device",
        (P("ValueError", r"Some modules are dispatched on the CPU or the disk"),),
        'device_map="auto" found too little memory for all of it, and 4-bit layers stay on one device unless you allow offloading.',
        "Free memory, or put everything on one device and see the plain shortage.",
        f"{HF_DOCS}/transformers/quantization/bitsandbytes#offloading",
        code='AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map={"": 0})',
        where="transformers",
    ),
    Entry(
        "spilled-to-disk",
        "memory",
        "device_map put a part of the model on the disk",
        (L(r"Some parameters are on the meta device because they were offloaded to the (disk|cpu)"),),
        'device_map="auto" does not fail when memory is short: it offloads to RAM, then to disk, and every token reads it from there.',
        "Look at hf_device_map after loading; give one device to fail instead of crawling.",
        f"{HF_DOCS}/accelerate/concept_guides/big_model_inference",
        code="assert not {'cpu', 'disk'} & set(map(str, model.hf_device_map.values())), model.hf_device_map",
        silent=True,
    ),
    Entry(
        "loaded-twice",
        "memory",
        "The old model is still there while the new one loads",
        (),
        "`model = from_pretrained(...)` in a second run builds the new model before the name lets go of the old one; so do other names, "
        "Jupyter's Out[...] and the last traceback.",
        "Delete every name for it first; after an error, restart the kernel.",
        "https://docs.pytorch.org/docs/stable/notes/faq.html",
        code="model = None\nimport gc; gc.collect()\nif torch.cuda.is_available(): torch.cuda.empty_cache()",
        silent=True,
    ),
    Entry(
        "mxfp4-dequantized",
        "memory",
        "A warning: the MXFP4 checkpoint becomes a bfloat16 model, three times as large",
        (
            L(
                r"MXFP4 quant\w+ .*default to dequantizing the model to bf16|(requires|need) [Tt]riton[^\n]{0,200}default to dequantizing the model to bf16"
            ),
        ),
        "The MXFP4 kernels cannot be used here (triton or kernels is missing or too old, or the GPU is), so gpt-oss-20b takes 41.8 GB and not 13.8.",
        "Install triton 3.4 or later and kernels, or plan for the larger model.",
        f"{TRANSFORMERS}/issues/42723",
        code='pip install -U kernels "triton>=3.4"',
        recorded="transformers issue 42723",
        silent=True,
    ),
    Entry(
        "vllm-cache-too-small",
        "memory",
        "vLLM has no room for one sequence of full length",
        (
            P(
                "ValueError",
                r"is larger than the maximum number of tokens that can be stored in KV cache|[Tt]o serve at least one request with the model'?s'? max seq len|No available memory for the cache blocks",
            ),
        ),
        "vLLM keeps room for one sequence of max_model_len tokens, which is the model's whole context unless you say less. After the weights, too little memory is left.",
        "Give a smaller max_model_len, raise gpu_memory_utilization, or use fewer bits: for the weights, or for the cache.",
        "https://github.com/vllm-project/vllm/issues/2418",
        code="vllm serve name --max-model-len 8192 --gpu-memory-utilization 0.92 --kv-cache-dtype fp8",
        recorded="vllm issues 2418 and 8933",
        where="vllm",
    ),
    Entry(
        "segmentation-fault",
        "memory",
        "Compiled code crashed (segmentation fault)",
        (
            P("ChildFailedError", r"exitcode *: -11\b|Signal 11 \(SIGSEGV\)"),
            L(r"(?:^|: |[\d ] )[Ss]egmentation fault\b|exit(ed with)? code:? 139\b|Signal 11 \(SIGSEGV\)"),
        ),
        "It is no error of Python: a library's compiled part touched memory that is not its own. Two packages that were built for different versions are the usual reason.",
        "Let Python print the line at which it happens, then reinstall that package and torch together.",
        "https://docs.python.org/3/library/faulthandler.html",
        code="python -X faulthandler script.py",
        recorded="Python's page on faulthandler",
        where="anywhere",
    ),
    Entry(
        "kernel-crashed",
        "memory",
        "The notebook's kernel ended without an error of Python",
        (
            L(
                r"The [Kk]ernel crashed while executing code in|Canceled future for execute_request message before replies were done"
            ),
        ),
        "The system killed it because memory ran out (the most frequent reason), or compiled code crashed.",
        "Run the code as a script: the shell then says `Killed` (memory) or `Segmentation fault`. Look how much memory is free before the cell.",
        "https://github.com/microsoft/vscode-jupyter/wiki/Kernel-crashes",
        code="jupyter nbconvert --to script notebook.ipynb && python -X faulthandler notebook.py",
        recorded="the wiki of vscode-jupyter on kernel crashes",
    ),
)
