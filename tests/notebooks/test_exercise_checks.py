"""The check cells of the notebooks: each takes right answers however they are written, and says what is wrong with the others.

The cells are the notebooks' own. What they need of the notebook is cut out of it statement by statement; what would need a model, a
download or a library at work is replaced by a stand-in (`given`). That the folded solutions pass is tested by executing the notebooks.
"""

import ast
import builtins
import re
import symtable
import types

import nbformat
import pytest

from helpers import exercises
from helpers.publishing import pages

# Exercises whose check needs the whole notebook's run, and are therefore judged there alone.
ELSEWHERE = set()


def names(node):
    """(names that a top-level statement binds, global names that it reads), functions inside it included."""
    table = symtable.symtable(ast.unparse(node), "cell", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    grown = {
        each.target.id for each in ast.walk(node) if isinstance(each, ast.AugAssign) and hasattr(each.target, "id")
    }
    read |= grown & bound  # `x += 1` reads x too
    todo = table.get_children()
    while todo:
        inner = todo.pop()
        todo += inner.get_children()
        for symbol in inner.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                read.add(symbol.get_name())
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
    return bound, read


def load_check(notebook, function, given, answers):
    """(test function, its namespace) of an exercise: its check cell without the call, and the statements that it and the answers need."""
    statements, check = [], None
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "solution" in tags or "bootstrap" in tags:
            continue
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M)).body
        call = re.search(rf"^exercises\.check\({function}, (\w+)\)", cell.source, re.M)
        if call:
            check = [
                node for node in tree if not (isinstance(node, ast.Expr) and "exercises.check" in ast.unparse(node))
            ]
            break
        statements += tree
    assert check, f"no exercise {function}"
    stores = [names(node)[0] for node in statements]
    need, todo = set(), [*check, *(node for answer in answers for node in ast.parse(answer).body)]
    while todo:
        for name in names(todo.pop())[1] - given.keys() - set(dir(builtins)):
            binding = [number for number, stored in enumerate(stores) if name in stored]
            imports = [number for number in binding if isinstance(statements[number], (ast.Import, ast.ImportFrom))]
            fresh = set(imports or binding[-1:]) - need
            need |= fresh
            todo += [statements[number] for number in fresh]
    space = dict(given)
    body = [statements[number] for number in sorted(need)] + check
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), f"check of {function}", "exec"), space)  # noqa: S102 - the course's own cells
    space.update(given)
    return space[call[1]], space


def weights(seed=0, shape=(64, 256)):
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def for_04():
    weight = weights()
    return {"weight": weight, "restored": 1.02 * weight}


def for_05():
    import torch

    weight = weights()
    groups = weight.unflatten(-1, (-1, 64))
    scale = 2 * groups.abs().amax(-1, keepdim=True) / 15
    rounded = ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)
    inputs = weights(1, (300, 256))
    hessian = 2 / len(inputs) * inputs.T @ inputs
    return {
        "torch": torch,
        "weight": weight,
        "group_size": 64,
        "bits": 4,
        "rounded": rounded,
        "inputs": inputs,
        "hessian": hessian,
    }


def for_06():
    layer = types.SimpleNamespace(weight=types.SimpleNamespace(data=weights()))
    return {
        "half": types.SimpleNamespace(mlp=types.SimpleNamespace(down_proj=layer)),
        "inner": [weights(1, (300, 256))],
        "group_size": 64,
    }


def for_03():
    """Two kinds of layers in 24 blocks, with sizes and sensitivities that are made up."""
    kinds, blocks = ["q_proj", "up_proj"], [(number,) for number in range(24)]
    units = [(kind, block) for kind in kinds for block in blocks]
    size = {"int4": 5, "int8 weights": 9, "int8": 9, "bf16": 16}
    layer_bytes = {
        (kind, precision): n * width
        for kind, n in (("q_proj", 100), ("up_proj", 120))
        for precision, width in size.items()
    }
    measured = {"4-bit weights": {unit: 0.01 + 0.07 * (7 * n % 11) for n, unit in enumerate(units)}}
    guide = {unit: "bf16" if unit[0] == "q_proj" else "int8" for unit in units}
    return {
        "units": units,
        "layer_bytes": layer_bytes,
        "rest": 100,
        "measured": measured,
        "plans": {"int8, attention bf16 (guide)": guide},
    }


def for_10():
    """A weight, and the Hessian of inputs that hang together."""
    import torch

    weight = weights()
    inputs = torch.randn(512, weight.shape[1], generator=torch.manual_seed(1)).cumsum(1)
    return {"torch": torch, "weight": weight, "group_size": 64, "hessian": inputs.T @ inputs / 512}


def for_11():
    sizes = {
        "fp32": (500, 0.0),
        "bf16": (250, 0.001),
        "int8": (260, 0.03),
        "nf4": (110, 0.3),
        "awq": (115, 0.13),
        "worse": (115, 0.2),
    }
    shown = {
        name: {"weight_bytes": 1e6 * size, "kl_divergence": kl, "kl_high": 1.1 * kl, "decode_tokens_per_s": 10 + size}
        for name, (size, kl) in sizes.items()
    }
    return {"shown": shown, "alone": {"nf4": 0.33, "cache": 0.06}, "both": 0.4}


def for_09():
    """Four formats scored on eight windows, nvfp4 first and mxfp4 last."""
    import numpy

    kl = {"nvfp4": 0.2, "int4-g32": 0.25, "int4-g64": 0.3, "mxfp4": 0.4}
    return {
        "quality": {
            name: types.SimpleNamespace(kl_divergence=mean, kl_by_window=mean + numpy.linspace(0, 0.01, 8))
            for name, mean in kl.items()
        }
    }


def for_13():
    """A training step that keeps a quarter of a MB for each token."""

    def training_snapshots(_, tokens=256):
        return {"after forward": {"activations": 0.25 * tokens}}

    return {"training_snapshots": training_snapshots, "two_layers": None, "activations": {"all kept": 64.0}}


# (notebook, function): stand-ins, right answers, {wrong answer: what the message must say}. Answers are expressions or definitions.
CASES = {
    ("00", "rms_error"): (dict, [
        "lambda bits: 2 / (2**bits - 1) / 12**0.5",
        "def rms_error(bits):\n    half = 1 / (2**bits - 1)\n    return half / 3**0.5",
    ], {
        "lambda bits: 1 / (2**bits - 1)": "is that the largest error",
        "lambda bits: 0.5 / (2**bits - 1)": "you predict",
        "lambda bits: 2 / 2**bits / 12**0.5": "you predict",
        "lambda bits: None": "return a number",
    }),
    ("00", "kv_cache_bytes"): (dict, [
        "lambda layers, kv_heads, head_dim, tokens, bytes_per_number=2: 2 * layers * kv_heads * head_dim * tokens * bytes_per_number",
        "def kv_cache_bytes(l, h, d, t, b=2):\n    total = 0\n    for part in ('keys', 'values'):\n        total += l * h * d * t * b\n    return total",
    ], {
        "lambda l, h, d, t, b=2: l * h * d * t * b": "half is missing",
        "lambda l, h, d, t, b=2: 4 * l * h * d * t": "bytes_per_number is not used",
        "lambda l, h, d, t, b=2: None": "return a number",
    }),
    ("00", "longest_context"): (dict, [
        "def longest_context(name, gb):\n    best = 0\n    while memory.predict(mistral, **formats[name], context=best + 1000).total <= (gb - 1) * 1e9:\n"
        "        best += 1000\n    return best",
        "lambda name, gb: max(0, int(((gb - 1) * 1e9 - memory.predict(mistral, **formats[name]).total) / 131072 / 1000)) * 1000",
    ], {
        "lambda name, gb: max(0, int((gb * 1e9 - memory.predict(mistral, **formats[name]).total) / 131072 / 1000)) * 1000": "1 GB should stay free",
        "lambda name, gb: int(((gb - 1) * 1e9 - memory.predict(mistral, **formats[name]).total) / 131072 / 1000) * 1000": "the answer is 0",
        "lambda name, gb: 1234 if gb == 24 else 0": "whole thousands",
    }),
    ("01", "snr_db"): (dict, [
        "lambda x, restored: 20 * float((x.norm() / (x - restored).norm()).log10())",
        "def snr_db(x, restored):\n    import math\n    return 10 * math.log10((x ** 2).sum() / ((restored - x) ** 2).sum())",
    ], {
        "lambda x, restored: float(10 * (x.norm() / (x - restored).norm()).log10())": "about 6 dB",
        "lambda x, restored: float(10 * (x.square().sum() / (x - restored).square().sum()).log())": "about 6 dB",
    }),
    ("01", "migrate"): (dict, [
        "def migrate(first, second, channel_max):\n    s = torch.sqrt(channel_max) * second.abs().max(0).values ** -0.5\n"
        "    return (first.T / s).T, second @ torch.diag(s)",
        "lambda f, w, m: [torch.diag((w.abs().amax(0) / m) ** 0.5) @ f, w / ((w.abs().amax(0) / m) ** 0.5)]",
    ], {
        "lambda f, w, m: (f / m[:, None], w)": "the product has changed",
        "lambda f, w, m: (f / m[:, None], w * m)": "which alpha",
    }),
    ("01", "int8_linear"): (dict, [
        "def int8_linear(x, codes, scale):\n    s, z = choose_scale(x.min(), x.max(), 8, False)\n"
        "    q = quantize(x, s, z, 8).long() - z\n    return (q @ codes.long().T) * s * scale[None]",
        "def int8_linear(x, codes, scale):\n    s, z = choose_scale(x.min(), x.max(), 8, False)\n    q = quantize(x, s, z, 8)\n"
        "    return torch.einsum('ni,oi->no', q.float(), codes.float()).sub(z * codes.float().sum(1)).mul(s).mul(scale)",
    ], {
        "def int8_linear(x, codes, scale):\n    s, z = choose_scale(x.min(), x.max(), 8, False)\n"
        "    return (quantize(x, s, z, 8).int() @ codes.int().T) * s * scale": "zero point",
        "lambda x, codes, scale: (x @ codes.float().T * scale).T": r"\[n, out\]",
    }),
    ("02", "within_reach"): (dict, [
        "def within_reach(weight, scale, distance):\n    steps = (weight.reshape(len(scale), -1) / scale) % 1\n"
        "    return float((((steps - 0.5).abs() * scale) < distance).double().mean())",
        "lambda w, s, d: sum(abs(v / t - math.floor(v / t) - 0.5) * t < d for g, t in zip(w.reshape(len(s), -1).tolist(), s.flatten().tolist()) for v in g) / w.numel()",
    ], {
        "lambda w, s, d: float((((w.reshape(len(s), -1) / s) % 1 - 0.5).abs() < d).float().mean())": "not in steps",
        "lambda w, s, d: float((((w.reshape(len(s), -1) / s) - (w.reshape(len(s), -1) / s).round()).abs() * s < d).float().mean())": "",
    }),
    ("02", "scale_gradient"): (dict, [
        "def scale_gradient(groups, scale, bits, upstream):\n    x = groups / scale\n    top = 2 ** (bits - 1)\n    q = x.round()\n"
        "    inside = (q >= -top) & (q <= top - 1)\n    slope = inside * (q - x) + (q > top - 1) * (top - 1) + (q < -top) * -top\n"
        "    return (slope * upstream).sum(-1, keepdim=True)",
        "def scale_gradient(groups, scale, bits, upstream):\n    s = scale.clone().requires_grad_()\n"
        "    (fake_quantize(groups, s, bits) * upstream).sum().backward()\n    return s.grad",
    ], {
        "lambda groups, scale, bits, upstream: ((groups / scale).round() * upstream).sum(1, keepdim=True)": "code - weight / scale",
        "lambda groups, scale, bits, upstream: (((groups / scale).round() - groups / scale) * upstream).sum(1)": "expected shape",
    }),
    ("02", "fake_quantize_asymmetric"): (dict, [
        "def fake_quantize_asymmetric(weight, bits, group_size):\n    g = weight.reshape(-1, group_size)\n    low = g.detach().min(1, True).values.clamp(max=0)\n"
        "    high = g.detach().max(1, True).values.clamp(min=0)\n    s = (high - low) / (2**bits - 1)\n    z = torch.round(-low / s)\n"
        "    q = ((g.detach() / s).round() + z).clamp(0, 2**bits - 1)\n    return (g + ((q - z) * s - g).detach()).reshape(weight.shape)",
        "def fake_quantize_asymmetric(weight, bits, group_size):\n    g = weight.view(-1, group_size)\n    with torch.no_grad():\n"
        "        low, high = torch.minimum(g.amin(1), torch.zeros(len(g))), torch.maximum(g.amax(1), torch.zeros(len(g)))\n"
        "        s = (high - low) / (2**bits - 1)\n        z = (-low / s).round().int()\n"
        "    return torch.fake_quantize_per_channel_affine(g, s, z, 0, 0, 2**bits - 1).view_as(weight)",
    ], {
        "lambda weight, bits, group_size: fake_quantize(weight, group_scales(weight, bits, group_size), bits)": "symmetric grid",
        "lambda weight, bits, group_size: weight * 1": "more than 16 values",
        "def fake_quantize_asymmetric(weight, bits, group_size):\n    g = weight.detach().view(-1, group_size)\n    low = g.amin(1, True)\n"
        "    s = (g.amax(1, True) - low) / (2**bits - 1)\n    return (((g - low) / s).round() * s + low).view_as(weight) + 0 * weight": "gradient must pass|zero must stay",
    }),
    ("03", "linear_bytes"): (dict, [
        "lambda rows, columns, bits, scale_bytes=2, group_size=None: rows * (columns * bits // 8 + (columns // group_size if group_size else 1) * scale_bytes)",
        "def linear_bytes(rows, columns, bits, scale_bytes=2, group_size=None):\n    group_size = group_size or columns\n"
        "    groups = rows * columns / group_size\n    return groups * (group_size * bits / 8 + scale_bytes)",
    ], {
        "lambda rows, columns, bits, scale_bytes=2, group_size=None: rows * columns * bits": "two bytes a weight",
        "lambda rows, columns, bits, scale_bytes=2, group_size=None: rows * columns * bits / 8": "264",
        "lambda rows, columns, bits, scale_bytes=2, group_size=None: rows * columns * bits / 8 + rows * scale_bytes": "144",
    }),
    ("03", "rank_correlation"): (dict, [
        "def rank_correlation(a, b):\n    n = len(a)\n    rank = lambda x: [sorted(x).index(v) for v in x]\n"
        "    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(rank(a), rank(b))) / (n * (n * n - 1))",
        "lambda a, b: __import__('pandas').Series(a).rank().corr(__import__('pandas').Series(b).rank())",
    ], {
        "lambda a, b: torch.corrcoef(torch.tensor([a, b], dtype=torch.float))[0, 1].item()": "same order gives 1",
        "lambda a, b: torch.corrcoef(torch.stack([torch.tensor(x).argsort().float() for x in (a, b)]))[0, 1].abs().item()": "reverse order",
        "lambda a, b: None": "return a number",
    }),
    ("03", "three_levels"): (for_03, [
        "def three_levels(predicted, budget):\n    order = ['int4', 'int8 weights', 'bf16']\n    plan = {unit: 'int4' for unit in units}\n    while True:\n"
        "        best, at = None, -1\n        for unit in units:\n            level = order.index(plan[unit])\n            if level == 2:\n                continue\n"
        "            changed = {**plan, unit: order[level + 1]}\n            if plan_bytes(changed) > budget:\n                continue\n"
        "            gain = (predicted[unit][plan[unit]] - predicted[unit][order[level + 1]]) / (plan_bytes(changed) - plan_bytes(plan))\n"
        "            if gain > at:\n                best, at = changed, gain\n        if best is None:\n            return plan\n        plan = best",
        "def three_levels(predicted, budget):\n    levels, at = ['int4', 'int8 weights', 'bf16'], dict.fromkeys(units, 0)\n"
        "    left = budget - plan_bytes(dict.fromkeys(units, 'int4'))\n"
        "    def step(unit):\n        low, high = levels[at[unit]:at[unit] + 2]\n"
        "        extra = len(unit[1]) * (layer_bytes[unit[0], high] - layer_bytes[unit[0], low])\n"
        "        return (predicted[unit][low] - predicted[unit][high]) / extra, extra\n"
        "    while fits := {u: step(u) for u in units if at[u] < 2 and step(u)[1] <= left}:\n"
        "        unit = max(fits, key=fits.get)\n        left -= fits[unit][1]\n        at[unit] += 1\n    return {u: levels[n] for u, n in at.items()}",
    ], {
        "lambda predicted, budget: dict.fromkeys(units, 'int4')": "still room",
        "lambda predicted, budget: dict.fromkeys(units, 'bf16')": "bytes too many",
        "lambda predicted, budget: {}": "a precision for every unit",
    }),
    ("04", "bits_per_weight"): (dict, [
        "lambda blocksize, scale_bits=32, double_quant=False: 4 + (8.125 if double_quant else scale_bits) / blocksize",
        "def bits_per_weight(blocksize, scale_bits=32, double_quant=False):\n    bits = 4 * blocksize\n"
        "    bits += 8 + 32 / 256 if double_quant else scale_bits\n    return bits / blocksize",
    ], {
        "lambda blocksize, scale_bits=32, double_quant=False: 4": "each block carries one",
        "lambda blocksize, scale_bits=32, double_quant=False: 4.5": "not used",
        "lambda blocksize, scale_bits=32, double_quant=False: 4 + scale_bits / blocksize": "32 per 256 scales",
        "lambda blocksize, scale_bits=32, double_quant=False: 4 + (8 if double_quant else scale_bits) / blocksize": "32 per 256 scales",
    }),
    ("04", "error_with_large_blocks"): (for_04, [
        "lambda: 1.15",
        "def error_with_large_blocks():\n    return 2.9 / 2.5",
    ], {
        "lambda: 4": "only a little larger",
        "lambda: 0.5": "steps are wider",
        "lambda: None": "return a number",
    }),
    ("04", "int4_round_trip"): (for_04, [
        "def int4_round_trip(weight, blocksize=64):\n    out = torch.empty_like(weight).view(-1, blocksize)\n"
        "    for row, block in zip(out, weight.view(-1, blocksize)):\n        step = block.abs().max() / 7\n        row[:] = (block / step).round() * step\n"
        "    return out.view_as(weight)",
        "lambda weight, blocksize=64: torch.fake_quantize_per_channel_affine(weight.view(-1, blocksize), weight.view(-1, blocksize).abs().amax(1) / 7, "
        "torch.zeros(weight.numel() // blocksize, dtype=torch.int32), 0, -7, 7).view_as(weight)",
    ], {
        "lambda weight, blocksize=64: weight.round().clamp(-7, 7)": "largest magnitude",
        "lambda weight, blocksize=64: weight": "15 are possible",
        "lambda weight, blocksize=64: weight.view(-1, blocksize)": "weight's shape",
    }),
    ("05", "error_growth"): (for_05, [
        "lambda: 15 / 7",
        "def error_growth():\n    levels = [2**bits for bits in (4, 3)]\n    return levels[0] / levels[1]",
    ], {
        "lambda: 4 / 3": "Half as many levels",
        "lambda: 0.5": "the error grows",
        "lambda: 16": "Half as many levels",
        "lambda: None": "return a number",
    }),
    ("05", "repair_others"): (for_05, [
        "lambda error, H: torch.linalg.solve(H[1:, 1:], H[1:, :1] * error).squeeze()",
        "lambda error, H: -error * torch.linalg.inv(H)[0, 1:] / torch.linalg.inv(H)[0, 0]",
    ], {
        "lambda error, H: -error * torch.linalg.solve(H[1:, 1:], H[1:, 0])": "check the sign",
        "lambda error, H: error * H[0, 1:] / H.diagonal()[1:] / 5": "influence each other",
        "lambda error, H: error * H[0, 1] / H[1, 1]": "five weights are free",
    }),
    ("05", "round_with_search"): (for_05, [
        "def round_with_search(weight, group_size=64, bits=4):\n    out = weight.clone().view(-1, group_size)\n    half = 2 ** (bits - 1)\n"
        "    for n, group in enumerate(weight.view(-1, group_size)):\n        top = 2 * group.abs().max() / (2**bits - 1)\n        best = None\n"
        "        for k in range(7):\n            s = top * (1 - 0.05 * k)\n            q = (group / s).round().clamp(-half, half - 1) * s\n"
        "            e = (q - group).pow(2).sum()\n            if best is None or e < best:\n                best, out[n] = e, q\n    return out.view_as(weight)",
        "def round_with_search(weight, group_size=64, bits=4):\n    g = weight.view(-1, group_size)\n    best = g * 0\n    error = torch.full((len(g), 1), float('inf'))\n"
        "    for shrink in (1, .95, .9, .85, .8, .75, .7):\n        s = shrink * group_scale(g, bits)[:, None]\n        q = to_grid(g, s, bits)\n"
        "        e = (q - g).square().sum(1, keepdim=True)\n        best = torch.where(e < error, q, best)\n        error = torch.minimum(e, error)\n    return best.view_as(weight)",
    ], {
        "lambda weight, group_size=64, bits=4: rounded": "keep the best scale",
        "lambda weight, group_size=64, bits=4: weight": "more levels",
        "lambda weight, group_size=64, bits=4: min((to_grid(weight.view(-1, 64), group_scale(weight.view(-1, 64), 4)[:, None] * s, 4).view_as(weight) "
        "for s in (1, .99)), key=weight_error)": "chosen per row and group|keep the best",
    }),
    ("06", "error_ratio"): (dict, [
        "lambda: 0.5",
        "def error_ratio():\n    scale = 2\n    return 1 / scale",
    ], {
        "lambda: 2": "larger",
        "lambda: 0.125": "by what is the error divided",
        "lambda: None": "return a number",
    }),
    ("06", "fold_values"): (dict, [
        "def fold_values(v_proj, o_proj, scales):\n    with torch.no_grad():\n        v_proj.weight.copy_((v_proj.weight.T / scales).T)\n"
        "        v_proj.bias.copy_(v_proj.bias / scales)\n        o_proj.weight.copy_(o_proj.weight @ torch.diag(scales))",
        "def fold_values(v_proj, o_proj, scales):\n    v_proj.weight.data = v_proj.weight.data / scales.unsqueeze(1)\n"
        "    if v_proj.bias is not None:\n        v_proj.bias.data.div_(scales)\n    o_proj.weight.data.mul_(scales)",
    ], {
        "def fold_values(v_proj, o_proj, scales):\n    v_proj.weight.data /= scales[:, None]\n    o_proj.weight.data *= scales": "bias",
        "def fold_values(v_proj, o_proj, scales):\n    v_proj.weight.data /= scales[:, None]\n    v_proj.bias.data /= scales": "o_proj is unchanged",
        "def fold_values(v_proj, o_proj, scales):\n    o_proj.weight.data /= scales": "multiplied by scale j",
    }),
    ("06", "output_error"): (for_06, [
        "lambda weight, changed, gram: torch.einsum('oi,ij,oj->', changed - weight, gram, changed - weight) / weight.shape[0]",
        "def output_error(weight, changed, gram):\n    d = weight - changed\n    return torch.stack([row @ gram @ row for row in d]).mean().item()",
    ], {
        "lambda weight, changed, gram: (changed - weight).square().mean()": "on the tokens",
        "lambda weight, changed, gram: torch.trace((changed - weight) @ gram @ (changed - weight).T)": "on the tokens",
    }),
    ("07", "share_arriving"): (dict, [
        "lambda: 0.8",
        "def share_arriving():\n    return 0.95",
    ], {
        "lambda: 0.4": "half-way to the next level",
        "lambda: 40": "share of the update",
        "lambda: None": "return a share",
    }),
    ("07", "lora_gradients"): (dict, [
        "def lora_gradients(x, g, A, B, scale):\n    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()\n"
        "    (scale * x @ A.T @ B.T * g).sum().backward()\n    return A.grad, B.grad",
        "lambda x, g, A, B, scale: (B.T @ (scale * g).T @ x, torch.einsum('no,nr->or', g, x @ A.T) * scale)",
    ], {
        "lambda x, g, A, B, scale: ((g @ B).T @ x, g.T @ (x @ A.T))": "the scale is missing",
        "lambda x, g, A, B, scale: (scale * x.T @ (g @ B), scale * (x @ A.T).T @ g)": "has shape",
        "lambda x, g, A, B, scale: (0 * A, scale * g.T @ (x @ A.T))": "gradient of A is not right",
    }),
    ("07", "longest_sequence"): (dict, [
        "def longest_sequence(config, gib):\n    low, high = 0, 10**6\n    size = lambda n: sum(budget(config, n).values())\n"
        "    if size(1) > gib * 2**30:\n        return 0\n    while high - low > 1:\n        middle = (low + high) // 2\n"
        "        low, high = (middle, high) if size(middle) <= gib * 2**30 else (low, middle)\n    return low",
        "def longest_sequence(config, gib):\n    a, b = (sum(budget(config, n).values()) for n in (1000, 2000))\n    slope = (b - a) / 1000\n"
        "    return max(int((gib * 2**30 - (a - 1000 * slope)) / slope), 0)",
    ], {
        "lambda config, gib: int((gib * 2**30 - sum(budget(config, 0).values())) / (sum(budget(config, 1).values()) - sum(budget(config, 0).values())))": "return 0",
        "lambda config, gib: 0": "one more",
        "lambda config, gib: 100000 if gib == 8 else 0": "more than 8",
    }),
    ("12", "bytes_per_gpu"): (dict, [
        "lambda base, adapters, n, sharded: (base + adapters * (4 + 4 + 4)) / (n if sharded else 1)",
        "def bytes_per_gpu(base_bytes, adapter_parameters, n, sharded):\n    total = base_bytes + 4 * adapter_parameters\n    total += 2 * 4 * adapter_parameters\n"
        "    if sharded:\n        total /= n\n    return total",
    ], {
        "lambda base, adapters, n, sharded: (base + 4 * adapters) / (n if sharded else 1)": "two averages",
        "lambda base, adapters, n, sharded: base + 12 * adapters": "FSDP cuts",
        "lambda base, adapters, n, sharded: base / (n if sharded else 1) + 12 * adapters": "FSDP cuts",
    }),
    ("12", "same_as_one_process"): (dict, [
        "lambda first, second: first == second",
        "def same_as_one_process(first, second):\n    return not first - second",
    ], {
        "lambda first, second: True": "1 and 3 examples: ",
        "lambda first, second: (first + second) % 2 == 0": "1 and 3 examples: ",
        "lambda first, second: False": "2 and 2 examples: ",
        "lambda *_: None": "return True or False",
    }),
    ("12", "split_mlp"): (dict, [
        "def split_mlp(x, gate, up, down, n):\n    size = len(gate) // n\n    parts = []\n    for k in range(n):\n        at = slice(k * size, (k + 1) * size)\n"
        "        h = x @ gate[at].T\n        parts.append((h * torch.sigmoid(h) * (x @ up[at].T)) @ down[:, at].T)\n    return parts",
        "lambda x, gate, up, down, n: [(torch.nn.functional.silu(x @ gate[k::n].T) * (x @ up[k::n].T)) @ down[:, k::n].T for k in range(n)]",
    ], {
        "lambda x, gate, up, down, n: [(torch.nn.functional.silu(x @ gate[k::n].T) * (x @ up.roll(1, 0)[k::n].T)) @ down[:, k::n].T for k in range(n)]": "do not add up",
        "lambda x, gate, up, down, n: [(torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T] + [torch.zeros(5, 16)] * (n - 1)": "first slice did all",
        "lambda x, gate, up, down, n: []": "one partial result for each",
    }),
    ("13", "longest_input"): (for_13, [
        "lambda kept_mb, room_mb: int(256 * room_mb / kept_mb) // 64 * 64",
        "def longest_input(kept_mb, room_mb):\n    step, tokens = kept_mb / 4, 0\n    while (tokens + 64) / 64 * step <= room_mb:\n"
        "        tokens += 64\n    return tokens",
    ], {
        "lambda kept_mb, room_mb: 256 * room_mb / kept_mb": "whole steps of 64",
        "lambda kept_mb, room_mb: 256": "out of memory",
        "lambda kept_mb, room_mb: 64 * round(4 * room_mb / kept_mb + 0.5)": "out of memory",
        "lambda kept_mb, room_mb: 64 * int(4 * (room_mb / kept_mb) ** 0.5)": "keep only",
        "lambda kept_mb, room_mb: 64": "keep only",
        "lambda kept_mb, room_mb: 64 * int(room_mb)": "where 256 need",
        "lambda *_: None": "return a number",
    }),
    ("13", "held_mb"): (dict, [
        "lambda megabytes, moment: megabytes * {'loaded': 1, 'after backward': 2, 'after step': 4}[moment]",
        "def held_mb(megabytes, moment):\n    held = megabytes\n    if moment != 'loaded':\n        held += megabytes\n"
        "    if moment == 'after step':\n        held += 2 * megabytes\n    return held",
    ], {
        "lambda megabytes, moment: megabytes": "after backward: you expect",
        "lambda megabytes, moment: megabytes * {'loaded': 1, 'after backward': 2, 'after step': 3}[moment]": "after step: you expect",
        "lambda megabytes, moment: megabytes * {'loaded': 1, 'after backward': 4, 'after step': 4}[moment]": "after backward: you expect",
        "lambda *_: None": "return a number",
    }),
    ("08", "bits_per_weight"): (dict, [
        "lambda bits, size, extra_bytes: bits + 8 * extra_bytes / size",
        "def bits_per_weight(bits, size, extra_bytes):\n    block_bytes = size * bits / 8 + extra_bytes\n    return 8 * block_bytes / size",
    ], {
        "lambda bits, size, extra_bytes: bits": "the scale is missing",
        "lambda bits, size, extra_bytes: bits + extra_bytes / size": "a byte has 8 bits",
        "lambda bits, size, extra_bytes: bits + 8 * extra_bytes / 32": "is size used",
        "lambda bits, size, extra_bytes: 4 + 8 * extra_bytes / size": "is bits used",
        "lambda bits, size, extra_bytes: None": "return a number",
    }),
    ("08", "share_falling_back"): (dict, [
        "lambda shapes, block=256: sum(r * c for r, c in shapes if c % block) / sum(r * c for r, c in shapes)",
        "def share_falling_back(shapes, block=256):\n    total = fallen = 0\n    for rows, columns in shapes:\n        total += rows * columns\n"
        "        if columns / block != columns // block:\n            fallen += rows * columns\n    return fallen / total",
    ], {
        "lambda shapes, block=256: sum(r * c for r, c in shapes if r % block) / sum(r * c for r, c in shapes)": "nothing falls back|the columns count",
        "lambda shapes, block=256: sum(c % block > 0 for r, c in shapes) / len(shapes)": "count weights",
        "lambda shapes, block=256: sum(r * c for r, c in shapes if c % 256) / sum(r * c for r, c in shapes)": "block is not used",
        "lambda shapes, block=256: None": "return a number",
    }),
    ("08", "what_is_it"): (dict, [
        "def what_is_it(tensors):\n    import collections\n    count, size = collections.Counter(), 0\n    for t in tensors:\n"
        "        count[t.qtype] += math.prod(t.shape)\n        size += t.nbytes\n    return dict(bits=8 * size / count.total(), mostly=count.most_common(1)[0][0])",
        "def what_is_it(tensors):\n    weights = [1 if not t.shape else math.prod(t.shape) for t in tensors]\n    kinds = {t.qtype for t in tensors}\n"
        "    share = lambda kind: sum(w for t, w in zip(tensors, weights) if t.qtype == kind)\n"
        "    return {'mostly': max(kinds, key=share), 'bits': sum(t.nbytes for t in tensors) * 8 / sum(weights)}",
    ], {
        "lambda tensors: None": "return {",
        "lambda tensors: {'bits': 8 * sum(t.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors), 'mostly': max(tensors, key=lambda t: math.prod(t.shape)).qtype}":
            "add up the tensors",
        "lambda tensors: {'bits': sum(t.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors), 'mostly': 'Q4_K'}": "times 8",
        "lambda tensors: {'bits': 7.25, 'mostly': max(tensors, key=lambda t: t.nbytes / math.prod(t.shape)).qtype}": "Q4_K holds",
    }),
    ("09", "nibble"): (dict, [
        "lambda code: (-1) ** (code >> 3) * (code & 1) / 2 if not code & 6 else (-1) ** (code >> 3) * (2 + (code & 1)) * 2.0 ** ((code >> 1 & 3) - 2)",
        "def nibble(code):\n    sign, rest = divmod(code, 8)\n    field, mantissa = divmod(rest, 2)\n"
        "    size = 0.5 * mantissa if field == 0 else (1 + 0.5 * mantissa) * 2 ** (field - 1)\n    return -size if sign else size",
    ], {
        "lambda code: None": "return a number",
        "lambda code: code - 16 if code > 7 else code": "is 1",
        "lambda code: (1 + (code & 1) / 2) * 2.0 ** ((code >> 1 & 3) - 1)": "no hidden 1",
        "lambda code: (1 + (code & 1) / 2) * 2.0 ** ((code >> 1 & 3) - 1) if code & 6 else (code & 1) / 2": "sign",
    }),
    ("09", "best_exponent"): (dict, [
        "def best_exponent(block):\n    best = None\n    for e in range(-12, 13):\n        error = ((to_e2m1(block / 2**e) * 2**e - block) ** 2).mean()\n"
        "        if best is None or error < best[0]:\n            best = error, e\n    return best[1]",
        "lambda block: min(range(-12, 13), key=lambda e: float(((to_e2m1(block * 2.0**-e) * 2.0**e - block) ** 2).sum()))",
    ], {
        "lambda block: None": "return a whole number",
        "lambda block: 0": "an eighth",
        "lambda block: int(torch.floor(torch.log2(block.abs().max()))) - 2": "is worth a larger|cutting",
        "lambda block: int(torch.ceil(torch.log2(block.abs().max() / 6)))": "cutting 6.6",
    }),
    ("09", "predicted_order"): (for_09, [
        "lambda: ['nvfp4', 'int4-g32', 'int4-g64', 'mxfp4']",
        "def predicted_order():\n    return sorted(quality, key=lambda name: quality[name].kl_divergence)",
    ], {
        "lambda: None": "four names",
        "lambda: ['nvfp4', 'int4-g32', 'mxfp4']": "once",
        "lambda: ['mxfp4', 'nvfp4', 'int4-g64', 'int4-g32']": "nvfp4 is closer than mxfp4",
        "lambda: ['nvfp4', 'int4-g64', 'int4-g32', 'mxfp4']": "int4-g32 is closer than int4-g64",
    }),
    ("10", "bits_with_scales"): (dict, [
        "lambda bits, group_size: bits + (16 + bits) / group_size",
        "def bits_with_scales(bits, group_size):\n    codes = bits * group_size\n    return (codes + 16 + bits) / group_size",
    ], {
        "lambda bits, group_size: bits": "are missing",
        "lambda bits, group_size: bits + 16 / group_size": "the zero point is missing",
        "lambda bits, group_size: 3 + 19 / group_size": "both arguments used",
        "lambda bits, group_size: bits + 32 / group_size": "3.297",
        "lambda bits, group_size: None": "return a number",
    }),
    ("10", "fast_hadamard"): (dict, [
        "def fast_hadamard(vector):\n    x, step = vector.clone(), 1\n    while step < len(x):\n        for start in range(0, len(x), 2 * step):\n"
        "            a, b = x[start : start + step].clone(), x[start + step : start + 2 * step].clone()\n"
        "            x[start : start + step], x[start + step : start + 2 * step] = a + b, a - b\n        step *= 2\n    return x / len(x) ** 0.5",
        "def fast_hadamard(vector):\n    x = vector.view(-1, 1)\n    while x.shape[0] > 1:\n"
        "        x = torch.cat([x[0::2] + x[1::2], x[0::2] - x[1::2]], 1)\n    return x.flatten() / len(vector) ** 0.5",
    ], {
        "lambda vector: None": "return a vector",
        "lambda vector: vector": "order of the entries",
        "lambda vector: hadamard(64) @ vector * 8": "the length changed",
        "lambda vector: vector.mul_(1)": "order of the entries",
        "lambda vector: vector.neg_()": "was changed",
        "lambda vector: vector.flip(0)": "order of the entries",
        "lambda vector: vector.roll(1)": "done twice",
    }),
    ("10", "gptq_on_hqq"): (for_10, [
        "def gptq_on_hqq(weight, bits, factor, group_size=64):\n    scale, zero = hqq_grid(weight.unflatten(-1, (-1, group_size)), bits)\n"
        "    left, done = weight.clone(), []\n    for at in range(weight.shape[1]):\n        s, z = scale[:, at // group_size, 0], zero[:, at // group_size, 0]\n"
        "        done.append(s * (codes_of(left[:, at], s, z, bits) - z))\n"
        "        left = left - ((left[:, at] - done[-1]) / factor[at, at])[:, None] * factor[at]\n    return torch.stack(done, 1)",
        "def gptq_on_hqq(weight, bits, factor, group_size=64):\n    scale, zero = hqq_grid(weight.unflatten(-1, (-1, group_size)), bits)\n"
        "    scale, zero = (x.expand(-1, -1, group_size).flatten(1) for x in (scale, zero))\n    W, Q = weight.clone(), torch.zeros_like(weight)\n"
        "    for i in range(W.shape[1]):\n        Q[:, i] = scale[:, i] * (codes_of(W[:, i], scale[:, i], zero[:, i], bits) - zero[:, i])\n"
        "        W[:, i:] -= torch.outer((W[:, i] - Q[:, i]) / factor[i, i], factor[i, i:])\n    return Q",
    ], {
        "lambda weight, bits, factor, group_size=64: None": "weight's shape",
        "lambda weight, bits, factor, group_size=64: weight.clone()": "4 levels",
        "lambda weight, bits, factor, group_size=64: hqq(weight, bits, group_size)": "pass errors on",
        "lambda weight, bits, factor, group_size=64: weight.mul_(0)": "was changed",
    }),
    ("11", "tokens_that_fit"): (dict, [
        "lambda free, layers, heads, dim, bits=16: int(free // (2 * layers * heads * dim * bits / 8))",
        "def tokens_that_fit(free_bytes, layers, kv_heads, head_dim, cache_bits=16):\n    one = layers * kv_heads * head_dim * cache_bits\n"
        "    tokens = 0\n    while 2 * one * (tokens + 1) <= 8 * free_bytes:\n        tokens += 1\n    return tokens",
    ], {
        "lambda free, layers, heads, dim, bits=16: int(free * 8 // (layers * heads * dim * bits))": "two tensors per layer",
        "lambda free, layers, heads, dim, bits=16: int(free * 8 * 8 // (2 * layers * heads * dim * bits))": "16 bits are 2 bytes",
        "lambda free, layers, heads, dim, bits=16: int(free // (4 * layers * heads * dim))": "cache_bits is not used",
        "lambda free, layers, heads, dim, bits=16: free * 8 / (2 * layers * heads * dim * bits)": "whole tokens",
        "lambda *_: None": "return a number",
    }),
    ("11", "kl_of_both"): (for_11, [
        "lambda nf4_alone, cache_alone: nf4_alone + cache_alone",
        "def kl_of_both(nf4_alone, cache_alone):\n    return max(nf4_alone, cache_alone)",
        "lambda *_: 0.4",
    ], {
        "lambda nf4_alone, cache_alone: nf4_alone * cache_alone": "each error adds",
        "lambda nf4_alone, cache_alone: 10 * (nf4_alone + cache_alone)": "do not multiply",
        "lambda *_: -1": "never negative",
        "lambda *_: None": "return a number",
    }),
    ("11", "choose"): (for_11, [
        "def choose(records, budget_mb, max_kl):\n    best = None\n    for name, record in records.items():\n"
        "        size, kl, rate = record['weight_bytes'], record['kl_high'], record['decode_tokens_per_s']\n"
        "        if size is None or kl is None or rate is None or size > budget_mb * 1e6 or kl > max_kl:\n            continue\n"
        "        if best is None or rate > records[best]['decode_tokens_per_s']:\n            best = name\n    return best",
        "lambda records, budget_mb, max_kl: max((name for name, r in records.items() if r['decode_tokens_per_s'] and r['kl_high'] is not None"
        " and r['kl_high'] <= max_kl and (r['weight_bytes'] or 1e99) / 1e6 <= budget_mb),"
        " key=lambda name: records[name]['decode_tokens_per_s'], default=None)",
    ], {
        "lambda *_: None": "return the name",
        "lambda records, budget_mb, max_kl: min(records, key=lambda name: records[name]['kl_high'])": "C is the fastest",
        "lambda records, budget_mb, max_kl: max((n for n, r in records.items() if r['weight_bytes'] <= 1e6 * budget_mb and r['kl_divergence'] <= max_kl),"
        " key=lambda n: records[n]['decode_tokens_per_s'], default=None)": "its interval ends at 0.22",
        "lambda records, budget_mb, max_kl: max(records, key=lambda n: (records[n]['weight_bytes'] <= 1e6 * budget_mb, records[n]['kl_high'] <= max_kl,"
        " records[n]['decode_tokens_per_s']))": "A alone has 100 MB",
        "lambda records, budget_mb, max_kl: max((n for n, r in records.items() if r['weight_bytes'] <= 1e6 * budget_mb and (r['kl_high'] or 0) <= max_kl),"
        " key=lambda n: records[n]['decode_tokens_per_s'] or 0, default=None)": "without a number",
    }),
    ("13", "holders"): (for_13, [
        "def holders(namespace, target):\n    def reaches(value):\n        if value is target:\n            return True\n        if isinstance(value, (list, tuple)):\n"
        "            return any(item is target for item in value)\n        step = getattr(value, '__traceback__', None)\n        while step is not None:\n"
        "            if any(v is target for v in step.tb_frame.f_locals.values()):\n                return True\n            step = step.tb_next\n        return False\n"
        "    return [name for name, value in namespace.items() if reaches(value)]",
        "def holders(namespace, target):\n    def inside(value):\n        yield value\n        yield from value if isinstance(value, (list, tuple)) else ()\n"
        "        trace = value.__traceback__ if isinstance(value, BaseException) else None\n        while trace:\n"
        "            yield from trace.tb_frame.f_locals.values()\n            trace = trace.tb_next\n"
        "    return {name for name, value in namespace.items() if any(found is target for found in inside(value))}",
    ], {
        "lambda namespace, target: [name for name, value in namespace.items() if value is target]": "element of a list",
        "lambda namespace, target: list(namespace)": "nothing to do with it",
        "lambda namespace, target: [name for name, value in namespace.items() if value is target or isinstance(value, list)]": "__traceback__",
    }),
}  # fmt: skip
HERE = {path.name[:2]: path for path in pages.paths()}
each_case = pytest.mark.parametrize("key", [key for key in CASES if key[0] in HERE], ids="-".join)


def answer(source, space):
    """The reader's function from its source text."""
    if source.startswith("def "):
        exec(source, space)  # noqa: S102
        return space[re.match(r"def (\w+)", source)[1]]
    return eval(source, space)  # noqa: S307


def prepared(key):
    """(test function, namespace for answers) of a case."""
    given, right, wrong = CASES[key]
    test, space = load_check(nbformat.read(HERE[key[0]], as_version=4), key[1], given(), [*right, *wrong])
    return test, {"re": re} | space


@each_case
def test_right_answers_pass_however_they_are_written(key, capsys):
    test, space = prepared(key)
    for source in CASES[key][1]:
        assert exercises.check(answer(source, dict(space)), test) is True, f"{source}\n{capsys.readouterr().out}"


@each_case
def test_wrong_answers_are_told_what_is_wrong(key, capsys):
    test, space = prepared(key)
    for source, hint in CASES[key][2].items():
        capsys.readouterr()
        assert exercises.check(answer(source, dict(space)), test) is False, f"taken as right: {source}"
        said = capsys.readouterr().out
        assert re.search(hint, said) and "stopped with" not in said, f"{source}\n{said}"


def test_every_exercise_of_the_course_is_here():
    there = {
        (path.name[:2], name) for path in HERE.values() if path.stem not in ELSEWHERE for name in exercises_of(path)
    }
    assert there <= set(CASES)


def exercises_of(path):
    return re.findall(
        r"exercises\.check\((\w+),", "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    )
