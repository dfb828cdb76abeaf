"""Failures with GGUF files and llama.cpp's server, each with its repair."""

from helpers.diagnosis.reproductions.parts import needs, tiny_gguf
from helpers.diagnosis.reproductions.registry import fails, works


@fails("gguf-cut-off", only_if=lambda: needs("xllamacpp"))
def _():
    from helpers.chat import llama

    path = tiny_gguf()
    path.write_bytes(path.read_bytes()[:-1000])
    with llama.serving(path):
        pass


@works("gguf-cut-off")
def _():
    import gguf

    return f"{len(gguf.GGUFReader(tiny_gguf()).tensors)} tensors, all of them there"


@fails("gguf-wrong-magic")
def _():
    import gguf

    path = tiny_gguf()
    path.write_bytes(b"<!DOCTYPE html>" + bytes(1000))  # the page of a file in place of the file
    gguf.GGUFReader(path)


@works("gguf-wrong-magic")
def _():
    return f"{tiny_gguf().read_bytes()[:4]!r}"


@fails("gguf-tensor-type-unknown")
def _():
    import gguf

    path = tiny_gguf()
    data = bytearray(path.read_bytes())
    place = (
        data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    )  # after its number of dimensions and its size
    data[place : place + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    gguf.GGUFReader(path)


@works("gguf-tensor-type-unknown")
def _():
    import gguf

    return ", ".join(sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(tiny_gguf()).tensors}))


@fails("llama-port-in-use", only_if=lambda: needs("xllamacpp"))
def _():
    import socket

    from helpers.chat import llama

    with socket.create_server(("127.0.0.1", 0)) as taken, llama.serving(tiny_gguf(), port=taken.getsockname()[1]):
        pass


@works("llama-port-in-use")
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf(), port=0) as server:
        return f"another port is free, and the server gives {len(llama.ask(server, '/tokenize', content='hi')['tokens'])} tokens for 'hi'"


@fails("llama-server-gone", only_if=lambda: needs("xllamacpp"))
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf()) as server:
        server.process.kill()
        server.process.wait()
        llama.ask(server, "/tokenize", content="hi")


@works("llama-server-gone")
def _():
    from helpers.chat import llama

    with llama.serving(tiny_gguf()) as server:
        return f"tokens {llama.ask(server, '/tokenize', content='hi')['tokens']}"
