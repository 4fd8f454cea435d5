"""What a run prints before its first step: where it computes, what it trains, which implementation each op uses, and why."""
import torch

from .. import devices, threads
from ..checks.explanation import explain
from ..tuning import saved
from . import captured


def banner(o, step, dtype, compiled, not_captured, malloc, ranks, folder, tokens):
    """Print it. step: the TrainingStep; malloc: why freed memory is not kept, or None; tokens: per step, over all ranks."""
    model, device = step.model, step.device
    c = model.config
    where = devices.describe(device) + (f" and {ranks.size - 1} more ranks" if ranks.size > 1 else "")
    how = "compiled" if compiled else "not compiled" + (" (auto)" if o.compile == "auto" else "")
    why = f" (auto: {devices.why_dtype(c.n_embd)})" if device.type == "cpu" and o.dtype == "auto" else ""
    print(f"device  {where}, {str(dtype).removeprefix('torch.')}{why}, {how}")
    if device.type == "cpu" and torch.get_num_threads() > 1:
        print(f"threads {threads.about()}")
    print(f"model   {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary {c.vocab_size:,}: "
          f"{model.get_num_params():,} parameters")
    print(f"step    {o.gradient_accumulation_steps} x {o.batch_size} x {c.block_size} = {tokens:,} tokens; {o.max_iters:,}"
          f" steps on {folder}")
    if o.verbose:
        _how(o, step, dtype, not_captured, malloc, ranks)
    print(f"writes  {o.out_dir}", flush=True)


def _how(o, step, dtype, not_captured, malloc, ranks):
    """The rest: memory, graphs, casts, and each op's implementation."""
    model, device, weights = step.model, step.device, step.weights
    if device.type == "cpu":
        print("memory  " + (f"malloc's defaults: {malloc}" if malloc else
                            "what is freed stays in this process; --malloc=off gives it back"))
    elif device.type == "cuda":
        again = any(block.mlp.recompute for block in model.transformer.h)
        print(f"memory  GELU's results are {'recomputed in' if again else 'saved for'} the backward"
              + (" (auto: from the GPU's free memory)" if o.recompute == "auto" else ""))
    if step.sharded:
        print(f"shards  weights, gradients and moments are divided among {ranks.size} rank{'s' * (ranks.size > 1)} (FSDP2)"
              + (f"; blocks are gathered in {str(dtype).removeprefix('torch.')}" if dtype != torch.float32 else ""))
    if o.optimizer == "muon":
        print("optim   Muon for the matrices of the blocks, AdamW for the rest")
    reason = step.why_not_by_row()
    print("embed   " + ("one operation; its gradient is added to the head's by row" if reason is None else f"PyTorch's own calls: {reason}"))
    reason = step.why_not_in_one_pass()
    print("update  " + ("clipping, AdamW and casts are one pass over memory" if reason is None else f"PyTorch's own calls: {reason}"))
    print("graphs  " + (f"none: {not_captured}" if not_captured else
                        f"the step is captured in CUDA graphs after {captured.WARM_UP_STEPS} ordinary ones"))
    if dtype != torch.float32 and not step.sharded:
        print(f"casts   {len(weights.copies)} matrices to {str(dtype).removeprefix('torch.')} once a step"
              + (f"; the others at every use: {'; '.join(weights.why_not)}" if weights.why_not else ""))
    with weights.in_use():
        explanation = explain(model, dtype=dtype, tokens=model.config.block_size, batch_size=o.batch_size, return_logits=False)
    for i, line in enumerate(str(explanation).splitlines()):
        print(f"{'ops' if i == 0 else '':<7} {line}")
    if (line := saved.about(device.type == "cuda")) is not None:
        print(f"tuned   {line}")
