"""Failures while text is generated, each with its repair."""

import torch

from helpers.diagnosis.reproductions.parts import (
    CHATML,
    IDS,
    MISTRAL,
    hidden,
    needs,
    tiny_gguf,
    tiny_model,
    tiny_tokenizer,
)
from helpers.diagnosis.reproductions.registry import fails, listening, works


@fails("no-padding-token")
def _():
    tiny_tokenizer()(["hi", "the cat sat"], padding=True)


@works("no-padding-token")
def _():
    tokenizer = tiny_tokenizer(padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # for generation; training wants a token of its own
    return str(tokenizer(["hi", "the cat sat"], padding=True).input_ids)


@fails("lengths-differ")
def _():
    tiny_tokenizer(pad_token="<pad>")(["hi", "the cat sat"], return_tensors="pt")


@works("lengths-differ")
def _():
    batch = tiny_tokenizer(pad_token="<pad>", padding_side="left")(
        ["hi", "the cat sat"], return_tensors="pt", padding=True
    )
    return f"a tensor of {tuple(batch.input_ids.shape)}"


@fails("no-chat-template")
def _():
    tiny_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}])


@works("no-chat-template")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    return repr(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).replace("\n", ""))


@fails("roles-must-alternate")
def _():
    conversation = [{"role": "system", "content": "is"}, {"role": "user", "content": "hi"}]
    tiny_tokenizer(chat_template=MISTRAL).apply_chat_template(conversation)


@works("roles-must-alternate")
def _():
    from helpers import chat

    conversation = [{"role": "system", "content": "is"}, {"role": "user", "content": "hi"}]
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    return repr(tokenizer.decode(chat.render(tokenizer, conversation)))


@fails("batch-encoding-as-ids")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    tiny_model().generate(prompt, max_new_tokens=2)


@works("batch-encoding-as-ids")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    return f"{tiny_model().generate(**prompt, max_new_tokens=2, pad_token_id=3).shape[1]} tokens"


@fails("different-devices")
def _():
    model = tiny_model()
    model.model.layers[1].to(
        "cuda" if torch.cuda.is_available() else "meta"
    )  # shapes without data: every machine's second device
    model(IDS)


@works("different-devices")
def _():
    model = tiny_model().to("cuda" if torch.cuda.is_available() else "cpu")
    return f"both on the {model(IDS.to(model.device)).logits.device.type}"


@fails("unused-model-kwargs")
def _():
    tiny_model().generate(IDS, max_new_tokens=2, temperatur=0.7)


@works("unused-model-kwargs")
def _():
    return f"{tiny_model().generate(IDS, max_new_tokens=2, do_sample=True, temperature=0.7, pad_token_id=3).shape[1]} tokens"


@fails("prompt-longer-than-max-length")
def _():
    tiny_model().generate(IDS, max_length=3)


@works("prompt-longer-than-max-length")
def _():
    return f"{tiny_model().generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=3).shape[1]} tokens: 4 of the prompt, 3 new"


@fails("beyond-the-context")
def _():
    with listening() as heard:
        tiny_model().generate(IDS.repeat(1, 16), max_new_tokens=4, min_new_tokens=4)
    return heard.about("predefined maximum length")


@works("beyond-the-context")
def _():
    model = tiny_model()
    room = model.config.max_position_embeddings - 8
    return f"the last {room} tokens of the prompt and 8 new ones: {model.generate(IDS.repeat(1, 16)[:, -room:], max_new_tokens=8).shape[1]}"


@fails("probabilities-not-finite")
def _():
    model = tiny_model()
    model.lm_head.weight.data[0] = float("inf")  # float16 ends at 65,504: a large activation is enough
    model.generate(IDS, max_new_tokens=2, do_sample=True)


@works("probabilities-not-finite")
def _():
    logits = tiny_model(torch.bfloat16)(IDS).logits
    assert logits.isfinite().all()
    return f"bfloat16 reaches {torch.finfo(torch.bfloat16).max:.0e}; every logit is finite"


@fails("token-id-outside")
def _():
    tiny_model()(torch.tensor([[3, 64]]))


@works("token-id-outside")
def _():
    model = tiny_model()
    model.resize_token_embeddings(65, mean_resizing=False)
    return f"logits {tuple(model(torch.tensor([[3, 64]])).logits.shape)}"


@fails("quantized-cache-backend")
def _():
    with hidden("transformers.cache_utils.is_optimum_quanto_available"):
        tiny_model().generate(IDS, max_new_tokens=2, cache_implementation="quantized")


@works("quantized-cache-backend")
def _():
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    return f"{tiny_model().generate(IDS, max_new_tokens=2, min_new_tokens=2, **options).shape[1]} tokens with the cache in 8 bits"


@fails("right-padding")
def _():
    tokenizer = tiny_tokenizer(pad_token="<pad>", padding_side="right")
    batch = tokenizer(["hi", "the cat sat"], padding=True, return_tensors="pt")
    with listening() as heard:
        tiny_model(pad_token_id=3).generate(**batch, max_new_tokens=2)
    return heard.about("right-padding")


@works("right-padding")
def _():
    tokenizer, model = tiny_tokenizer(pad_token="<pad>", padding_side="left"), tiny_model(pad_token_id=3)

    def answer(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model.generate(**batch, max_new_tokens=4, min_new_tokens=4)[:, batch.input_ids.shape[1] :]

    assert torch.equal(answer(["hi", "the cat sat"])[0], answer(["hi"])[0])
    return "the short prompt gets the answer that it gets alone"


@fails("gguf-without-template")
def _():
    from helpers.chat import llama

    with llama.session(tiny_gguf(template=None)):
        pass


@works("gguf-without-template")
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(template=None), chat_template=CHATML) as server:
        return repr(llama.ask(server, "/apply-template", messages=[{"role": "user", "content": "hi"}])["prompt"])


@fails("gguf-template-does-not-parse", only_if=lambda: needs("xllamacpp"))
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(template="{% for message in messages %}{{ message")):
        pass


@works("gguf-template-does-not-parse")
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(template=CHATML)) as server:
        return repr(llama.ask(server, "/apply-template", messages=[{"role": "user", "content": "hi"}])["prompt"])


@fails("llama-context-too-small", only_if=lambda: needs("xllamacpp"))
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(), n_ctx=256) as server:
        llama.ask(server, "/completion", prompt=[5] * 300, n_predict=1)


@works("llama-context-too-small")
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(), n_ctx=512) as server:
        return f"{llama.ask(server, '/completion', prompt=[5] * 300, n_predict=1)['tokens_evaluated']} tokens were read"
