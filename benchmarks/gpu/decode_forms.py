"""One decode step of GPT-2 124M in bf16 for 1 to 64 rows: forms and tiles of kernels/decode_rows.py beside the step made of ops.

    python -m benchmarks.gpu.decode_forms --json FILE [--seconds 40] [--rows 8,64] [--workers 12]

For each form: its logits' relative L2 error against the step made of ops, microseconds a step of a captured CUDA graph, and
microseconds a launch of each of its kernels, by a graph of that kernel alone over all layers behind one that empties the L2 cache.
A form that fails is a row with its traceback. One JSON line a result, printed too.
"""
import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
import traceback

import torch

from nanogpt_fast import generation
from nanogpt_fast.kernels import decode, decode_rows
from nanogpt_fast.kernels.decode_rows import Tile
from nanogpt_fast.model import GPT, GPTConfig

BF16 = torch.bfloat16
POSITION, BLOCK_SIZE = 640, 1024
DEVICE = "cuda"


def tiles(norm, add, head, attend=None):
    """Settings of decode_rows: a row of TILES, and `attend` as (elements a thread, warps)."""
    return dict(row={"norm_qkv": Tile(*norm), "norm_act": Tile(*norm), "linear_add": Tile(*add), "head": Tile(*head)}, attend=attend)


# {rows: {form: settings}}
FORMS = {
    4: {"base": {}},
    8: {
        "base": {},
        "small": tiles((8, 8, 4, 64), (8, 16, 4, 64), (8, 32, 4, 64), (32, 4)),
        "large": tiles((8, 32, 8, 32), (8, 8, 8, 32), (8, 32, 8, 32), (16, 8)),
        "eight": tiles((8, 16, 8, 32), (8, 16, 8, 64), (8, 16, 8, 32), (16, 4)),
    },
    16: {
        "base": {},
        "large": tiles((16, 32, 8, 32), (16, 16, 8, 32), (16, 32, 8, 32), (16, 8)),
        "eight": tiles((16, 16, 8, 32), (16, 8, 8, 32), (16, 16, 8, 32), (16, 4)),
    },
    32: {
        "base": {},
        "by 16": tiles((16, 32, 8, 32), (16, 16, 8, 32), (16, 32, 8, 32), (16, 8)),
        "small": tiles((32, 16, 8, 32), (32, 8, 8, 32), (32, 32, 8, 32), (16, 4)),
    },
    64: {
        "base": {},
        "by 16": tiles((16, 32, 8, 32), (16, 16, 8, 32), (16, 32, 8, 32), (16, 8)),
        "small": tiles((32, 32, 8, 32), (32, 8, 8, 32), (32, 32, 8, 32), (16, 4)),
        "large": tiles((16, 64, 8, 32), (32, 32, 8, 32), (16, 16, 8, 32), (32, 8)),
    },
}


@contextlib.contextmanager
def settings(row=None, attend=None):
    """decode_rows with another tile table."""
    before = decode_rows.TILES, decode_rows.attend_tile
    try:
        if row is not None:
            decode_rows.TILES = dict.fromkeys(before[0], row)
        if attend is not None:
            elements, warps = attend
            decode_rows.attend_tile = lambda HEAD, programs: (elements * 32 * warps // HEAD, warps)
        yield
    finally:
        decode_rows.TILES, decode_rows.attend_tile = before


def model_of(**changes):
    with torch.device(DEVICE):
        return GPT(GPTConfig(**{**dict(bias=False, dropout=0.0, block_size=BLOCK_SIZE), **changes})).eval()


def session_of(model, rows):
    """With random keys and values, its rows at POSITION. It keeps weak references to the parameters: keep the model."""
    session = generation.Session(model, rows, BF16)
    session.refresh()
    session.cache.normal_()
    session.feed(torch.randint(model.config.vocab_size, (rows,), device=DEVICE), torch.full((rows,), POSITION, device=DEVICE))
    return session


def build(session, form):
    layers = [decode.Layer(layer.ln_1, layer.c_attn, layer.c_proj, layer.ln_2, layer.c_fc, layer.mlp_proj, *session.cache[i],
                           layer.activation) for i, layer in enumerate(session.layers)]
    return form(session.wte, session.wpe, session.ln_f, session.head, layers)


def compile_form(rows, form):
    """In a process of its own: fill Triton's cache with what this form needs."""
    try:
        with torch.no_grad(), settings(**FORMS[rows][form]):
            model = model_of(n_layer=1)
            session = session_of(model, rows)
            build(session, decode_rows.RowsDecoder)(session.token, session.position)
            torch.cuda.synchronize()
        return None
    except Exception:
        return traceback.format_exc(limit=-3)


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


def chains(decoder, session, empty):
    """{kernel: microseconds a launch}: each alone over all layers, behind a write of `empty`, whose own time is taken off."""
    out = torch.empty(decoder.B, decoder.V, device=DEVICE)
    runs = {
        "norm_qkv": decoder.norm_qkv, "attend": lambda layer: decoder.attend(layer, session.position),
        "linear_add C": lambda layer: decoder.linear_add(decoder.y, layer.c_proj), "norm_act": decoder.norm_act,
        "linear_add F": lambda layer: decoder.linear_add(decoder.h, layer.mlp_proj)}
    nothing = microseconds(captured(lambda: empty.zero_()), 5)
    found = {}

    def chain(name, run, launches):
        def both():
            empty.zero_()
            run()
        found[name] = round((microseconds(captured(both), 5) - nothing) / launches, 2)
    for name, run in runs.items():
        chain(name, lambda: [run(layer) for layer in decoder.layers], len(decoder.layers))
    chain("head", lambda: decoder.logits(out), 1)
    return found


def profile(decoder, session):
    """{kernel: microseconds}, the mean of its launches in 3 steps that are not captured."""
    from torch.profiler import ProfilerActivity, profile as profiler
    with profiler(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(3):
            decoder(session.token, session.position)
        torch.cuda.synchronize()
    times = {}
    for event in prof.events():
        if event.device_time > 0:
            times.setdefault(event.name, []).append(event.device_time)
    return {name: [round(statistics.mean(values), 2), len(values) // 3] for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.decode_forms", description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=40, help="no form is begun later")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[8, 64, 16, 32, 4, 1])
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    start = time.perf_counter()
    file = open(args.json, "a")

    def tell(**row):
        line = json.dumps({**row, "at_s": round(time.perf_counter() - start, 1)})
        print(line, flush=True)
        file.write(line + "\n")
        file.flush()

    def attempt(name, run, **row):
        if time.perf_counter() - start > args.seconds:
            return tell(**row, what=name, error="no time left")
        try:
            result = run()
            tell(**row, what=name, **(result if isinstance(result, dict) else {"us": result}))
            return result
        except Exception:
            tell(**row, what=name, error=traceback.format_exc(limit=-4))

    tell(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    wanted = [(rows, form) for rows in args.rows for form in FORMS.get(rows, ())]
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(wanted)) or 1) as pool:
        compiling = pool.starmap_async(compile_form, wanted, chunksize=1)
        model = model_of()
        errors = compiling.get()
    for (rows, form), error in zip(wanted, errors):
        if error:
            tell(rows=rows, what=f"compiling {form}", error=error)
    tell(what="compiled", forms=len(wanted))

    empty = torch.empty(32 * 2**20, device=DEVICE)      # 128 MB
    with torch.no_grad():
        for rows in args.rows:
            session = session_of(model, rows)
            session.native = None
            expected = session.decode(BLOCK_SIZE).float()
            attempt("ops", lambda: round(microseconds(captured(lambda: session.decode(BLOCK_SIZE)), 20), 1), rows=rows)

            def form_result(form):
                decoder = build(session, form)
                out = decoder(session.token, session.position)
                error = ((out - expected).norm() / expected.norm()).item()
                us = microseconds(captured(lambda: decoder(session.token, session.position)), 20)
                return decoder, dict(us=round(us, 1), relative_error=float(f"{error:.2g}"))
            if rows <= 8:
                attempt("matvec", lambda: form_result(decode.Decoder)[1], rows=rows)
            best = None
            for name, options in FORMS.get(rows, {}).items():
                with settings(**options):
                    made = []

                    def whole():
                        made.append(form_result(decode_rows.RowsDecoder))
                        return made[0][1]
                    if attempt(name, whole, rows=rows) is None:
                        continue
                    attempt(f"{name}: kernels", lambda: chains(made[0][0], session, empty), rows=rows)
                    if best is None or made[0][1]["us"] < best[0]:
                        best = made[0][1]["us"], made[0][0], options, name
            if best is not None and rows in (8, 64):
                with settings(**best[2]):
                    attempt(f"{best[3]}: profile", lambda: profile(best[1], session), rows=rows)
            best = session = expected = None


if __name__ == "__main__":
    main()
