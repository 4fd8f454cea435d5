"""The public repositories that swap_table.py runs: for each a function that builds a small model of its own classes, and a call of it."""
import ast
import contextlib
import importlib
import sys
import types
from pathlib import Path

import torch

B, T, C, H, V, LAYERS = 2, 32, 64, 2, 65, 2
REPOSITORIES = {}     # {owner/name: (title of the model, function of a checkout)}


def repository(name, model):
    """Register a function of a checkout's path that returns (make the model, call it)."""
    def register(function):
        REPOSITORIES[name] = (model, function)
        return function
    return register


def definitions(path, name="definitions", **names):
    """A module with the imports of a file that work, its constants, functions and classes; `names` are set afterwards."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    for node in tree.body:
        constant = isinstance(node, ast.Assign) and (isinstance(node.value, (ast.Constant, ast.UnaryOp))
                                                     or ast.unparse(node.value) == "logging.getLogger(__name__)")
        if constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            with contextlib.suppress(Exception) if isinstance(node, ast.ImportFrom) else contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
    vars(module).update(names)
    return module


def imported(root, name):
    sys.path.insert(0, str(root))
    return importlib.import_module(name)


def tokens(vocabulary=V, seed=1):
    return torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


def normal(*shape):
    """The same numbers in float64 as in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(torch.get_default_dtype())


def with_targets(model):
    return model(tokens(), tokens(seed=2))


def logits(model):
    return model(tokens())


NANO = dict(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C, dropout=0.0)
NO_DROPOUT = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
SIZES = {name: value for name, value in NANO.items() if name != "dropout"}


@repository("karpathy/nanoGPT", "model.GPT")
def _(root):
    m = imported(root, "model")
    return lambda: m.GPT(m.GPTConfig(**NANO)), with_targets


@repository("karpathy/minGPT", "mingpt.model.GPT")
def _(root):
    m = definitions(root / "mingpt" / "model.py", CN=None)
    config = types.SimpleNamespace(**SIZES, **NO_DROPOUT, model_type=None)
    return lambda: m.GPT(config), with_targets


@repository("karpathy/build-nanogpt", "train_gpt2.GPT")
def _(root):
    m = definitions(root / "train_gpt2.py")
    return lambda: m.GPT(m.GPTConfig(**SIZES)), with_targets


@repository("karpathy/ng-video-lecture", "gpt.GPTLanguageModel")
def _(root):
    m = definitions(root / "gpt.py", **NANO, device="cpu")
    return lambda: m.GPTLanguageModel(), with_targets


@repository("karpathy/makemore", "makemore.Transformer")
def _(root):
    m = definitions(root / "makemore.py")
    return lambda: m.Transformer(m.ModelConfig(**SIZES)), with_targets


@repository("karpathy/llm.c", "train_gpt2.GPT")
def _(root):
    m = definitions(root / "train_gpt2.py")
    return lambda: m.GPT(m.GPTConfig(**SIZES)), with_targets


@repository("karpathy/llama2.c", "model.Transformer")
def _(root):
    m = imported(root, "model")
    return lambda: m.Transformer(m.ModelArgs(dim=C, n_layers=LAYERS, n_heads=H, vocab_size=V, max_seq_len=T)), with_targets


@repository("KellerJordan/modded-nanogpt", "records/track_1_short/2024-10-10_Muon/train_gpt2.GPT")
def _(root):
    m = definitions(root / "records" / "track_1_short" / "2024-10-10_Muon" / "train_gpt2.py")
    return lambda: m.GPT(m.GPTConfig(vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C)), with_targets


@repository("rasbt/LLMs-from-scratch", "ch04 gpt.GPTModel")
def _(root):
    m = definitions(root / "ch04" / "01_main-chapter-code" / "gpt.py")
    config = dict(vocab_size=V, context_length=T, emb_dim=C, n_heads=H, n_layers=LAYERS, drop_rate=0.0, qkv_bias=False)
    return lambda: m.GPTModel(config), logits


@repository("lucidrains/x-transformers", "TransformerWrapper, Decoder")
def _(root):
    m = imported(root, "x_transformers")
    return lambda: m.TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=m.Decoder(dim=C, depth=LAYERS, heads=H)), logits


@repository("pytorch-labs/gpt-fast", "model.Transformer")
def _(root):
    m = imported(root, "model")

    def make():
        model = m.Transformer(m.ModelArgs(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=H, dim=C))
        model.setup_caches(B, T)
        for layer in model.layers:
            layer.attention.kv_cache = None     # it is written to in place, which autograd refuses
        return model

    return make, lambda model: model(tokens(), torch.arange(T))


@repository("Lightning-AI/lit-llama", "lit_llama.model.LLaMA")
def _(root):
    lit_llama = sys.modules["lit_llama"] = types.ModuleType("lit_llama")   # the package imports lightning
    lit_llama.__path__ = [str(root / "lit_llama")]
    sys.modules["lit_llama.utils"] = types.SimpleNamespace(find_multiple=lambda n, k: -(-n // k) * k)
    m = importlib.import_module("lit_llama.model")
    return lambda: m.LLaMA(m.LLaMAConfig(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C)), logits


@repository("Lightning-AI/litgpt", "litgpt.model.GPT")
def _(root):
    m = imported(root, "litgpt.model")
    config = m.Config(block_size=T, padded_vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C)
    return lambda: m.GPT(config), logits


@repository("graykode/gpt-2-Pytorch", "GPT2.model.GPT2LMHeadModel")
def _(root):
    m, config = definitions(root / "GPT2" / "model.py"), definitions(root / "GPT2" / "config.py", "config")
    config = config.GPT2Config(V, n_positions=T, n_ctx=T, n_embd=C, n_layer=LAYERS, n_head=H)
    return lambda: m.GPT2LMHeadModel(config), logits


@repository("suno-ai/bark", "bark.model.GPT")
def _(root):
    m = definitions(root / "bark" / "model.py")
    config = {**NANO, "input_vocab_size": V, "output_vocab_size": V}
    del config["vocab_size"]
    return lambda: m.GPT(m.GPTConfig(**config)), logits


@repository("kzl/decision-transformer", "atari mingpt.model_atari.GPT")
def _(root):
    m = definitions(root / "atari" / "mingpt" / "model_atari.py")
    config = m.GPTConfig(V, 3 * 4, n_layer=LAYERS, n_head=H, n_embd=C, max_timestep=100, model_type="reward_conditioned")

    def call(model):
        actions = tokens()[:, :4, None]
        return model(normal(B, 4, 4 * 84 * 84), actions, actions, torch.ones(B, 4, 1), torch.full((B, 1, 1), 3))

    return lambda: without_dropout(m.GPT(config)), call


@repository("CompVis/taming-transformers", "taming.modules.transformer.mingpt.GPT")
def _(root):
    m = definitions(root / "taming" / "modules" / "transformer" / "mingpt.py")
    return lambda: m.GPT(V, T, n_layer=LAYERS, n_head=H, n_embd=C), lambda model: model(tokens(), targets=tokens(seed=2))


@repository("epfml/llm-baselines", "models.base.GPTBase")
def _(root):
    m = definitions(root / "src" / "models" / "base.py", tiktoken=types.SimpleNamespace(get_encoding=lambda name: None))
    config = types.SimpleNamespace(vocab_size=V, sequence_length=T, n_layer=LAYERS, n_head=H, n_embd=C, dropout=0.0, bias=True, moe=False,
                                   parallel_block=False, untied_embeds=False, init_std=0.02)
    return lambda: m.GPTBase(config), lambda model: model(tokens(), tokens(seed=2), get_logits=True)


@repository("sanjeevanahilan/nanoChatGPT", "model.GPT")
def _(root):
    m = definitions(root / "model.py")
    return lambda: m.GPT(m.GPTConfig(**NANO)), with_targets


@repository("affjljoo3581/GPT2", "gpt2.modeling.Transformer")
def _(root):
    m = imported(root / "src", "gpt2.modeling")
    make = lambda: m.Transformer(LAYERS, 0, V, T, H, C, dropout=0.0, bidirectional=False)  # noqa: E731
    return make, lambda model: model(tokens(V - 1) + 1)


@repository("pytorch/examples", "minGPT-ddp mingpt.model.GPT")
def _(root):
    m = definitions(root / "distributed" / "minGPT-ddp" / "mingpt" / "model.py")
    return lambda: m.GPT(m.GPTConfig(model_type=None, **SIZES, **NO_DROPOUT)), with_targets


@repository("pytorch/benchmark", "torchbenchmark/models/nanogpt GPT")
def _(root):
    m = definitions(root / "torchbenchmark" / "models" / "nanogpt" / "model.py")
    return lambda: m.GPT(m.GPTConfig(**NANO)), logits


@repository("metavoiceio/metavoice-src", "fam.llm.model.GPT")
def _(root):
    m = imported(root, "fam.llm.model")
    config = {**NANO, "vocab_sizes": [V], "dropout": 0.0}
    del config["vocab_size"]
    return lambda: m.GPT(m.GPTConfig(**config)), lambda model: model(tokens()[:, None], tokens(seed=2)[:, None])


@repository("Andrei-Aksionov/nanoGPTplus", "src.model.GPTLanguageModel")
def _(root):
    m = imported(root, "src.model.gpt_language_model.gpt")
    make = lambda: m.GPTLanguageModel(V, C, T, None, H, 4, LAYERS, True, 0.0)  # noqa: E731
    return make, logits


@repository("BlinkDL/minGPT-tuned", "mingpt.model.GPT")
def _(root):
    m = definitions(root / "mingpt" / "model.py")
    return lambda: m.GPT(m.GPTConfig(V, T, n_layer=LAYERS, n_head=H, n_embd=C, **NO_DROPOUT)), with_targets


@repository("FareedKhan-dev/train-llm-from-scratch", "src.models.transformer.Transformer")
def _(root):
    m = imported(root, "src.models.transformer")
    return lambda: m.Transformer(n_head=H, n_embed=C, context_length=T, vocab_size=V, N_BLOCKS=LAYERS), with_targets


@repository("shehper/sparse-dictionary-learning", "transformer.model.GPT")
def _(root):
    m = definitions(root / "transformer" / "model.py")
    return lambda: m.GPT(m.GPTConfig(**NANO)), with_targets


@repository("notmahi/miniBET", "behavior_transformer.gpt.GPT")
def _(root):
    m = definitions(root / "behavior_transformer" / "gpt.py")
    config = {**NANO, "input_dim": 8, "output_dim": 8}
    del config["vocab_size"]
    return lambda: m.GPT(m.GPTConfig(**config)), lambda model: model(normal(B, T, 8))


@repository("eloialonso/iris", "models.transformer.Transformer")
def _(root):
    models = sys.modules["models"] = types.ModuleType("models")             # the package imports the environments
    models.__path__ = [str(root / "src" / "models")]
    m = importlib.import_module("models.transformer")
    config = m.TransformerConfig(tokens_per_block=T // 2, max_blocks=2, attention="causal", num_layers=LAYERS, num_heads=H, embed_dim=C,
                                 embed_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return lambda: m.Transformer(config), lambda model: model(normal(B, T, C))


@repository("dtsip/in-context-learning", "src.models.TransformerModel, on transformers' GPT2Model")
def _(root):
    m = definitions(root / "src" / "models.py")

    def call(model):
        x = normal(B, T // 2, 8)
        return model(x, x[..., 0])

    return lambda: m.TransformerModel(8, T // 2, n_embd=C, n_layer=LAYERS, n_head=H), call


@repository("NVIDIA/ngpt", "model.GPT")
def _(root):
    m = imported(root, "model")
    return lambda: m.GPT(m.GPTConfig(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C)), with_targets


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model
