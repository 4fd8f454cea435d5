"""One decode step of GPT-2 124M in bf16 for 1 to 64 rows: kernels/decode.py and decode_rows.py beside the step made of ops.

    python -m benchmarks.gpu.decode_forms --json FILE [--rows 4,8] [--seconds 60]

For each form: microseconds a step of a captured CUDA graph, and its logits' relative L2 error against the step made of ops; for
decode_rows.py also microseconds a launch of each kernel, by a graph of that kernel alone over all layers behind one that empties
the L2 cache, and likewise the attention of the step made of ops with its keys split and whole. A form that fails gives a row with its
traceback. One JSON line a result, printed too.
"""
import argparse
import json
import statistics
import time
import traceback

import torch
import triton
from nanogpt_fast.kernels import attention_decode, decode, decode_rows

from nanogpt_fast import generation
from nanogpt_fast.model import GPT, GPTConfig

POSITION, BLOCK_SIZE = 640, 1024
DEVICE = "cuda"
FORMS = {"matvec": (decode.Decoder, 8), "rows": (decode_rows.RowsDecoder, decode_rows.LARGEST_B)}      # and up to how many rows


def session_of(model, rows):
    """With random keys and values, its rows at POSITION, the step made of ops."""
    session = generation.Session(model, rows, torch.bfloat16)
    session.native = None
    session.refresh()
    session.cache.normal_()
    session.feed(torch.randint(model.config.vocab_size, (rows,), device=DEVICE), torch.full((rows,), POSITION, device=DEVICE))
    return session


def build(session, form):
    layers = [decode.Layer(layer.ln_1, layer.c_attn, layer.c_proj, layer.ln_2, layer.c_fc, layer.mlp_proj, *session.cache[i],
                           layer.activation) for i, layer in enumerate(session.layers)]
    return form(session.wte, session.wpe, session.ln_f, session.head, layers)


def captured(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


def microseconds(graph, replays, rounds=5):
    """Of a replay: the median of some rounds."""
    graph.replay()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / replays)
    return statistics.median(found)


def cold(run, launches, empty):
    """Microseconds of one of the `launches` of run(), behind a write of `empty`, whose own time is taken off."""
    def both():
        empty.zero_()
        run()
    return round((microseconds(captured(both), 5) - microseconds(captured(empty.zero_), 5)) / launches, 2)


def kernels_of(decoder, session, empty):
    """{kernel: microseconds a launch} of a RowsDecoder."""
    decoder(session.token, session.position)            # what each kernel finds: x, its statistics, the rows' lengths
    out = torch.empty(decoder.B, decoder.V, device=DEVICE)
    runs = {
        "norm_qkv": decoder.norm_qkv, "attend": lambda layer: decoder.attend(layer, session.position),
        "linear_add C": lambda layer: decoder.linear_add(decoder.y, layer.c_proj), "norm_act": decoder.norm_act,
        "linear_add F": lambda layer: decoder.linear_add(decoder.h, layer.mlp_proj)}
    over_layers = lambda run: lambda: [run(layer) for layer in decoder.layers]
    found = {name: cold(over_layers(run), len(decoder.layers), empty) for name, run in runs.items()}
    return {**found, "head": cold(lambda: decoder.logits(out), 1, empty)}


def attention_of(session, empty):
    """{form: microseconds a layer} of the op's attention, both forms at any number of heads."""
    q = torch.randn(session.rows, session.n_head, 1, session.cache.size(-1), dtype=torch.bfloat16, device=DEVICE)
    lengths, usual, found = session.position + 1, attention_decode.WHOLE_HEADS, {}
    for form, least in (("split", 10**9), ("whole", 1)):
        attention_decode.WHOLE_HEADS = least
        try:
            found[form] = cold(lambda: [attention_decode.attention_decode(q, *kv, lengths, scale=0.125) for kv in session.cache],
                               len(session.cache), empty)
        finally:
            attention_decode.WHOLE_HEADS = usual
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.decode_forms", description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=60, help="nothing is begun later")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[4, 16, 64, 2, 8, 32, 24, 1, 3])
    args = parser.parse_args()
    start = time.perf_counter()
    file = open(args.json, "a")

    def tell(**row):
        line = json.dumps({**row, "at_s": round(time.perf_counter() - start, 1)})
        print(line, flush=True)
        file.write(line + "\n")
        file.flush()

    def attempt(rows, name, run):
        if time.perf_counter() - start > args.seconds:
            return tell(rows=rows, what=name, error="no time left")
        try:
            tell(rows=rows, what=name, **run())
        except Exception:
            tell(rows=rows, what=name, error=traceback.format_exc(limit=-4))

    tell(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    with torch.device(DEVICE):
        model = GPT(GPTConfig(bias=False, dropout=0.0, block_size=BLOCK_SIZE)).eval()
    empty = torch.empty(32 * 2**20, device=DEVICE)      # 128 MB
    with torch.no_grad():
        for rows in args.rows:
            session = session_of(model, rows)
            step = lambda: session.decode(BLOCK_SIZE)
            attempt(rows, "ops", lambda: dict(us=round(microseconds(captured(step), 20), 1)))

            def whole(form):
                decoder = build(session, form)
                run = lambda: decoder(session.token, session.position)
                expected = step().float()
                error = ((run() - expected).norm() / expected.norm()).item()
                return dict(us=round(microseconds(captured(run), 20), 1), relative_error=float(f"{error:.2g}"))
            for name, (form, most) in FORMS.items():
                if rows <= most:
                    attempt(rows, name, lambda: whole(form))
            attempt(rows, "attention", lambda: attention_of(session, empty))
            if rows <= decode_rows.LARGEST_B:
                attempt(rows, "rows: kernels", lambda: kernels_of(build(session, decode_rows.RowsDecoder), session, empty))


if __name__ == "__main__":
    main()
