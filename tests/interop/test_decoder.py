"""The decoder families against transformers, on tiny random models.

For every family: logits; every site against a hook on the transformers module; and, for every kind
of site, the logits after the activation there has been replaced. Needs torch and transformers, and
the example binary: `cargo build --release -p strata-nn --example logits`.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("STRATA_BIN_DIR", ROOT / "target/release/examples")) / "logits"
BATCH, LENGTH, VOCAB = 2, 13, 97
TOLERANCE = 1e-4

BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GPT2 = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)
OPT = {**BASE, "ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 32,
       "tie_word_embeddings": True}

CASES = {
    "llama": ("Llama", BASE),
    "llama-mha-tied": ("Llama", {**BASE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-bias-head-dim": (
        "Llama", {**BASE, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3": ("Llama", {**BASE, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {**BASE, "rope_parameters": dict(rope_type="linear", rope_theta=500.0, factor=4.0)}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 5}),
    "mistral-full": ("Mistral", {**BASE, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", BASE),
    "qwen2-window": (
        "Qwen2",
        {**BASE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 16}),
    "qwen3-bias-tied": (
        "Qwen3", {**BASE, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {**BASE, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 4,
         "tie_word_embeddings": True, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": (
        "Gemma2",
        {**BASE, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": None,
         "final_logit_softcapping": None, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-by-layer": (
        "GPT2", {**GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True,
                 "activation_function": "relu"}),
    "neox-parallel": ("GPTNeoX", {**BASE, "rotary_pct": 0.5}),
    "neox-sequential": (
        "GPTNeoX", {**BASE, "rotary_pct": 1.0, "use_parallel_residual": False,
                    "hidden_act": "gelu_new"}),
    "opt": ("OPT", OPT),
    "opt-post-norm": (
        "OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-no-bias": ("OPT", {**OPT, "enable_bias": False}),
}

ROTARY = {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "GPTNeoX"}


def modules(family, model):
    """Where a family keeps the modules that the sites stand at."""
    if family == "GPT2":
        body = model.transformer
        blocks = [
            dict(norm1=b.ln_1, fused=b.attn.c_attn, attn=b.attn, o=b.attn.c_proj, norm2=b.ln_2,
                 up=b.mlp.c_fc, down=b.mlp.c_proj, block=b)
            for b in body.h
        ]
        return dict(embed=body.wte, norm=body.ln_f, blocks=blocks)
    if family == "GPTNeoX":
        body = model.gpt_neox
        blocks = [
            dict(norm1=b.input_layernorm, fused=b.attention.query_key_value, attn=b.attention,
                 o=b.attention.dense, norm2=b.post_attention_layernorm, up=b.mlp.dense_h_to_4h,
                 down=b.mlp.dense_4h_to_h, block=b)
            for b in body.layers
        ]
        return dict(embed=body.embed_in, norm=body.final_layer_norm, 
                    blocks=blocks)
    if family == "OPT":
        body = model.model.decoder
        blocks = [
            dict(norm1=b.self_attn_layer_norm, q=b.self_attn.q_proj, k=b.self_attn.k_proj,
                 v=b.self_attn.v_proj, attn=b.self_attn, o=b.self_attn.out_proj,
                 norm2=b.final_layer_norm, up=b.fc1, down=b.fc2, block=b)
            for b in body.layers
        ]
        return dict(embed=body.project_in or body.embed_tokens, norm=body.final_layer_norm, blocks=blocks)
    body = model.model
    blocks = []
    for b in body.layers:
        m = dict(norm1=b.input_layernorm, q=b.self_attn.q_proj, k=b.self_attn.k_proj,
                 v=b.self_attn.v_proj, attn=b.self_attn, o=b.self_attn.o_proj,
                 norm2=b.post_attention_layernorm, gate=b.mlp.gate_proj, up=b.mlp.up_proj,
                 down=b.mlp.down_proj, block=b)
        if family == "Gemma2":
            m.update(norm2=b.pre_feedforward_layernorm, norm1_post=b.post_attention_layernorm,
                     norm2_post=b.post_feedforward_layernorm)
        blocks.append(m)
    return dict(embed=body.embed_tokens, norm=body.norm, blocks=blocks)


class Part:
    """Columns of a fused projection that belong to q, k or v."""

    def __init__(self, family, index, heads=4):
        self.family, self.index, self.heads = family, index, heads

    def get(self, y):
        if self.family == "GPT2":
            return y.chunk(3, dim=-1)[self.index]
        y = y.reshape(*y.shape[:-1], self.heads, 3, -1)
        return y[..., self.index, :].flatten(-2)

    def put(self, y, part):
        y = y.clone()
        if self.family == "GPT2":
            width = part.shape[-1]
            y[..., self.index * width:(self.index + 1) * width] = part
            return y
        view = y.view(*y.shape[:-1], self.heads, 3, -1)
        view[..., self.index, :] = part.view(*part.shape[:-1], self.heads, -1)
        return y


class Whole:
    def get(self, y):
        return y

    def put(self, y, part):
        return part


def places(family, model, config):
    """Site name -> (module, side, part): the input or output of a module is the activation."""
    m = modules(family, model)
    whole = Whole()
    post_norm = family == "OPT" and not config.do_layer_norm_before
    parallel = family == "GPTNeoX" and config.use_parallel_residual
    found = {}
    if family != "Gemma2":  # whose embedding module may or may not contain the scaling
        found["hook_embed"] = (m["embed"], "out", whole)
    if m["norm"] is not None:
        found["ln_final.hook_normalized"] = (m["norm"], "out", whole)
    for i, b in enumerate(m["blocks"]):
        at = f"blocks.{i}."
        found[at + "hook_resid_pre"] = (b["block"], "in", whole)
        found[at + "hook_resid_post"] = (b["block"], "out", whole)
        if not post_norm:
            found[at + "ln1.hook_normalized"] = (b["norm1"], "out", whole)
            found[at + "ln2.hook_normalized"] = (b["norm2"], "out", whole)
            if not parallel:
                found[at + "hook_resid_mid"] = (b["norm2"], "in", whole)
        else:
            found[at + "hook_resid_mid"] = (b["norm1"], "out", whole)
        for index, letter in enumerate("qkv"):
            if "fused" in b:
                found[at + f"attn.hook_{letter}"] = (b["fused"], "out", Part(family, index))
            else:
                found[at + f"attn.hook_{letter}"] = (b[letter], "out", whole)
        found[at + "attn.hook_z"] = (b["o"], "in", whole)
        found[at + "hook_attn_out"] = (b.get("norm1_post", b["o"]), "out", whole)
        if "gate" in b:
            found[at + "mlp.hook_pre"] = (b["gate"], "out", whole)
            found[at + "mlp.hook_pre_linear"] = (b["up"], "out", whole)
        else:
            found[at + "mlp.hook_pre"] = (b["up"], "out", whole)
        found[at + "mlp.hook_post"] = (b["down"], "in", whole)
        found[at + "hook_mlp_out"] = (b.get("norm2_post", b["down"]), "out", whole)
    return found


def first(value):
    return value[0] if isinstance(value, tuple) else value


def with_first(value, x):
    return (x, *value[1:]) if isinstance(value, tuple) else x


def hook(module, side, act):
    """Calls `act` on the input or output; what it returns, if anything, replaces it."""
    if side == "out":
        def run(_module, _args, output):
            x = act(first(output))
            return None if x is None else with_first(output, x)
        return module.register_forward_hook(run)

    def run_before(_module, args, kwargs):
        if args:
            x = act(args[0])
            return None if x is None else ((x, *args[1:]), kwargs)
        x = act(kwargs["hidden_states"])
        return None if x is None else (args, {**kwargs, "hidden_states": x})
    return module.register_forward_pre_hook(run_before, with_kwargs=True)


def hook_middle(block, act):
    """Replaces the residual stream after attention, which is no module's input alone: attention's
    output becomes what is missing from the block's input to the wanted stream."""
    kept = {}
    return [
        hook(block["block"], "in", lambda x: kept.update(x=x.clone())),
        hook(block.get("norm1_post", block["o"]), "out",
             lambda x: act(kept["x"] + x) - kept["x"]),
    ]


def build(case, folder):
    family, arguments = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    config = getattr(transformers, f"{family}Config")(**arguments)
    config._attn_implementation = "eager"
    kind = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Fresh norms are the identity and fresh biases zero: a test would not see them.
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokens = torch.randint(3, VOCAB, (BATCH, LENGTH))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    return family, model, config, tokens


def strata(folder, *options):
    out = folder / "out.safetensors"
    command = [str(BINARY), str(folder), str(folder / "tokens.json"), str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def difference(ours, theirs):
    assert ours.numel() == theirs.numel()
    return (ours.flatten() - theirs.detach().float().flatten()).abs().max().item()


pytestmark = pytest.mark.skipif(not BINARY.exists(), reason=f"{BINARY} is not built")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    built = {}

    def get(case):
        if case not in built:
            folder = tmp_path_factory.mktemp(case)
            built[case] = (folder, *build(case, folder))
        return built[case]
    return get


@pytest.mark.parametrize("case", CASES)
def test_logits_and_sites(case, cases):
    folder, family, model, config, tokens = cases(case)
    found = places(family, model, config)
    names = list(found)
    layers = config.num_hidden_layers
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in range(layers)]
    scores = [f"blocks.{i}.attn.hook_attn_scores" for i in range(layers)]
    ours = strata(folder, "--sites", ",".join(names + patterns + scores + ["logits"]))
    seen, handles = {}, []
    for name, (module, side, part) in found.items():
        def act(x, name=name, part=part):
            seen[name] = part.get(x).clone()
        handles.append(hook(module, side, act))
    with torch.no_grad():
        out = model(tokens, output_attentions=True)
    for handle in handles:
        handle.remove()
    assert difference(ours["logits"], out.logits) < TOLERANCE
    assert difference(ours["site.logits"], out.logits) < TOLERANCE
    for name in names:
        key = name if name.startswith("blocks") else f"site.{name}"
        assert difference(ours[key], seen[name]) < TOLERANCE, name
    for i, name in enumerate(patterns):
        assert difference(ours[name], out.attentions[i]) < 1e-5, name
        assert difference(ours[scores[i]].softmax(-1), out.attentions[i]) < 1e-5, scores[i]
    if family == "Gemma2":
        from_config = model.model.embed_tokens.weight[tokens] * config.hidden_size**0.5
        again = strata(folder, "--sites", "hook_embed")
        assert difference(again["site.hook_embed"], from_config) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_plain_logits(case, cases):
    """Without taps the fused attention runs instead of the composed one."""
    folder, _family, model, _config, tokens = cases(case)
    with torch.no_grad():
        assert difference(strata(folder)["logits"], model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "neox-parallel", "neox-sequential",
                                  "opt", "opt-post-norm", "qwen3"])
def test_replace(case, cases):
    folder, family, model, config, tokens = cases(case)
    with torch.no_grad():
        plain = model(tokens).logits
    layer_norm = family in ("GPT2", "GPTNeoX", "OPT")
    for name, (module, side, part) in places(family, model, config).items():
        if name.startswith("blocks.") and not name.startswith("blocks.1."):
            continue
        changed = False
        for option, value in (("--replace", 0.3), ("--scale", 1.5)):
            if option == "--replace" and name.endswith("hook_resid_mid") and layer_norm:
                continue  # a constant has no variance: LayerNorm would magnify rounding errors

            def act(x, part=part, option=option, value=value):
                y = part.get(x)
                y = torch.full_like(y, value) if option == "--replace" else y * value
                return part.put(x, y)
            if name.endswith("hook_resid_mid") and side == "in":
                handles = hook_middle(modules(family, model)["blocks"][1], act)
            else:
                handles = [hook(module, side, act)]
            with torch.no_grad():
                theirs = model(tokens).logits
            for handle in handles:
                handle.remove()
            ours = strata(folder, option, f"{name}={value}")["logits"]
            assert difference(ours, theirs) < TOLERANCE, (name, option)
            changed |= bool((theirs - plain).abs().max() > 1e-3)
        assert changed, f"neither constant nor factor at {name} changed anything"


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] in ROTARY])
def test_rotated(case, cases, monkeypatch):
    """Rotated queries and keys have no module to hook: see and replace what the function returns."""
    folder, family, model, _config, tokens = cases(case)
    module = sys.modules[type(model).__module__]
    rotate, calls, change = module.apply_rotary_pos_emb, [], None

    def watched(*args, **kwargs):
        rotated = list(rotate(*args, **kwargs))
        if len(calls) == 1 and change is not None:
            rotated[change] = torch.full_like(rotated[change], 0.4)
        calls.append([x.transpose(1, 2).flatten(0, 1).flatten(1) for x in rotated])
        return tuple(rotated)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", watched)
    sites = ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"]
    ours = strata(folder, "--sites", ",".join(sites))
    with torch.no_grad():
        model(tokens)
    for site, theirs in zip(sites, calls[1]):
        assert difference(ours[site], theirs) < TOLERANCE, site
    for change, site in enumerate(sites):
        calls.clear()
        with torch.no_grad():
            theirs = model(tokens).logits
        assert difference(strata(folder, "--replace", f"{site}=0.4")["logits"], theirs) < TOLERANCE


@pytest.mark.parametrize("site,value,weight", [
    ("blocks.1.attn.hook_pattern", 0.125, 0.125),
    ("blocks.1.attn.hook_attn_scores", 0.7, 1 / LENGTH),
])
@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2-by-layer"])
def test_replace_attention(case, site, value, weight, cases):
    """Scores and patterns have no module to hook. Constants there give every value one weight."""
    folder, family, model, config, tokens = cases(case)
    ours = strata(folder, "--replace", f"{site}={value}")["logits"]
    # A constant pattern makes z the scaled sum of the values; put exactly that in.
    attention = modules(family, model)["blocks"][1]
    values = {}
    part = Part(family, 2) if "fused" in attention else Whole()
    source = attention.get("fused", attention.get("v"))
    handles = [hook(source, "out", lambda x: values.update(v=part.get(x).clone()))]

    def mixed(_x):
        key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        heads = config.num_attention_heads // key_heads
        v = values["v"].unflatten(-1, (key_heads, -1))
        total = weight * v.sum(1, keepdim=True).expand_as(v)
        return total.repeat_interleave(heads, dim=2).flatten(-2)
    handles.append(hook(attention["o"], "in", mixed))
    with torch.no_grad():
        theirs = model(tokens).logits
    for handle in handles:
        handle.remove()
    assert difference(ours, theirs) < TOLERANCE


def test_names_without_prefix(tmp_path):
    """Hub files of GPT-2 store `h.0...` without `transformer.`; so do files of bare bodies."""
    from safetensors.torch import save_file
    _family, model, _config, tokens = build("gpt2", tmp_path)
    state = {
        k.removeprefix("transformer."): v.contiguous()
        for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert difference(strata(tmp_path)["logits"], model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype, tmp_path):
    """Stored in half, computed in f32."""
    _family, model, _config, tokens = build("llama", tmp_path)
    # Only the weights are rounded: the model's own `to` would round its rotation frequencies too.
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())
        theirs = model(tokens).logits
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    assert difference(strata(tmp_path)["logits"], theirs) < TOLERANCE


def test_old_config_keys(tmp_path):
    """Configs of transformers 4 keep rope_theta and rope_scaling at the top."""
    _family, model, _config, tokens = build("llama3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert difference(strata(tmp_path)["logits"], model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("key,value,word", [
    ("model_type", "rwkv", "llama, mistral"),
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("hidden_size", 0, "hidden_size"),
    ("hidden_size", 64, "shape"),
    ("num_hidden_layers", 99999999, "num_hidden_layers"),
    ("num_hidden_layers", 4, "layers.3"),
    ("vocab_size", -1, "vocab_size"),
    ("hidden_act", "xielu", "xielu"),
    ("head_dim", 7, "head_dim"),
])
def test_bad_config(key, value, word, tmp_path):
    build("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    path.write_text(json.dumps(config))
    command = [str(BINARY), str(tmp_path), str(tmp_path / "tokens.json"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr, done.stderr
    assert "panicked" not in done.stderr


def test_bad_tokens(tmp_path):
    build("gpt2", tmp_path)
    for tokens, word in (([[1, 97]], "97"), ([[1] * 65], "positions"), ([], "tokens")):
        (tmp_path / "tokens.json").write_text(json.dumps(tokens))
        done = subprocess.run(
            [str(BINARY), str(tmp_path), str(tmp_path / "tokens.json"), str(tmp_path / "out")],
            capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr, done.stderr
