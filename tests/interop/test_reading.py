"""Strata reads what other tools wrote, and computes the same numbers from it.

PyTorch pickles written by torch, GGUF files written by the `gguf` package, quantised checkpoints
written by compressed-tensors and (where it is installed) llm-compressor, tokenizers in the three
forms in which checkpoints carry them. What is expected always comes from the other tool.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# In f32 only the order of additions separates the two.
CLOSE = 1e-4
HEADS, KEY_HEADS = 4, 2
STORIES = SHARED / "data/stories260k"


def read_back(path):
    """A directory as transformers reads it, computed in f32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def token_ids(vocabulary, rows=2, columns=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (rows, columns), generator=generator)


def llama(**changes):
    """A random Llama whose rows are whole blocks of every GGML type."""
    torch.manual_seed(0)
    config = dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, vocab_size=320, max_position_embeddings=128,
        initializer_range=0.05, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def theirs(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def assert_close(ours, expected, bound=CLOSE):
    assert ours.shape == expected.shape
    spread = expected.std().item()
    assert spread > 0.01, "logits without spread would compare nothing"
    assert (ours - expected).abs().max().item() < bound


@pytest.fixture(scope="module")
def plain():
    return llama()


# ------------------------------------------------------------------------------------- pickles


def save_pickle(model, path, shards=1, **how):
    """pytorch_model.bin, or shards with the index that transformers wrote for them."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = dict(model.state_dict())
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin", **how)
        return path
    names = sorted(state)
    where = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[shard::shards]}
        torch.save(part, path / file, **how)
        where.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pickle_computes_what_safetensors_compute(strata_logits, tmp_path, dtype):
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "safe")
    pickled = save_pickle(model, tmp_path / "pickled")
    ids = token_ids(320)
    safe = strata_logits(tmp_path / "safe", ids.tolist())
    assert torch.equal(strata_logits(pickled, ids.tolist()), safe)
    assert_close(safe, theirs(read_back(tmp_path / "safe"), ids))


@pytest.mark.parametrize(
    "how",
    [
        {"shards": 3},
        {"_use_new_zipfile_serialization": False},
        {"shards": 2, "_use_new_zipfile_serialization": False},
        {"pickle_protocol": 4},
    ],
    ids=["sharded", "legacy", "legacy-sharded", "protocol-4"],
)
def test_pickles_of_other_shapes(strata_logits, plain, tmp_path, how):
    path = save_pickle(plain, tmp_path / "model", **how)
    ids = token_ids(320)
    assert_close(strata_logits(path, ids.tolist()), theirs(plain, ids))


def test_a_pickle_of_tied_and_turned_tensors(strata_logits, tmp_path):
    """Storages that several tensors share, and views that are not contiguous."""
    model = llama(tie_word_embeddings=True)
    expected = theirs(model, token_ids(320))
    up = model.model.layers[0].mlp.up_proj
    turned = up.weight.detach().t().contiguous().t()
    assert not turned.is_contiguous()
    up.weight = torch.nn.Parameter(turned)
    path = save_pickle(model, tmp_path / "model")
    ours = strata_logits(path, token_ids(320).tolist())
    assert_close(ours, expected)


# ---------------------------------------------------------------------------------------- GGUF

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, index, part = stem.split(".", 3)
        return f"blk.{index}.{NAMES[part]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def interleave(rows, heads):
    """The row order of q and k that llama.cpp's converter writes."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def separate(rows, heads):
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)


def random_k_blocks(kind, shape, rng):
    """Blocks that the `gguf` package can read but not write: random codes, small scales."""
    rows, columns = shape
    size, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)

    def put(at, low, high):
        values = rng.uniform(low, high, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)

    if kind == Type.Q6_K:  # ql, qh, scales, d
        put(width - 2, -2e-5, 2e-5)
    elif kind == Type.Q5_K:  # d, dmin, scales, qh, qs
        put(0, 2e-5, 6e-5)
        put(2, 4e-4, 1e-3)
    else:
        put(0, 4e-5, 1.2e-4)
        put(2, 4e-4, 1e-3)
    return blocks.reshape(rows, -1)


def quantise(values, kind, rng):
    if kind.name.endswith("_K"):
        return random_k_blocks(kind, values.shape, rng)
    return gguf.quants.quantize(values, kind)


def write_gguf(path, model, kind, vocabulary=None, kind_of=None):
    """A GGUF file as llama.cpp's converter makes it; returns the weights that it holds."""
    config, rng = model.config, np.random.default_rng(3)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if vocabulary:
        vocabulary(writer)
    state, held = model.state_dict(), {}
    tied = config.tie_word_embeddings
    for name in state:
        if tied and name.startswith("lm_head"):
            continue
        values = state[name].float().numpy()
        used = Type.F32 if values.ndim == 1 else (kind_of or {}).get(name, kind)
        turns = heads if "q_proj" in name else key_heads if "k_proj" in name else None
        stored = interleave(values, turns) if turns else values
        raw = quantise(np.ascontiguousarray(stored), used, rng)
        plain_type = used in (Type.F32, Type.F16)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=None if plain_type else used)
        back = raw.astype(np.float32) if plain_type else gguf.quants.dequantize(raw, used)
        back = back.reshape(values.shape)
        held[name] = torch.from_numpy(separate(back, turns) if turns else back).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tied:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    return held


KINDS = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_computes_with_the_weights_it_holds(strata_logits, tmp_path, kind):
    model = llama()
    file = tmp_path / f"tiny-{kind}.gguf"
    held = write_gguf(file, model, Type[kind])
    before = theirs(model, token_ids(320))
    model.load_state_dict(held)
    expected = theirs(model, token_ids(320))
    if kind in ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
        # The writer of this test keeps the weights: quantised they are near the original ones.
        assert (expected - before).pow(2).mean() < 0.1 * before.pow(2).mean()
    assert_close(strata_logits(file, token_ids(320).tolist()), expected)


def test_gguf_of_mixed_types_as_converters_mix_them(strata_logits, tmp_path):
    model = llama()
    mixed = {n: Type.Q6_K for n in model.state_dict() if "v_proj" in n or "down_proj" in n}
    mixed["lm_head.weight"] = Type.Q8_0
    held = write_gguf(tmp_path / "mixed.gguf", model, Type.Q4_K, kind_of=mixed)
    model.load_state_dict(held)
    ours = strata_logits(tmp_path / "mixed.gguf", token_ids(320).tolist())
    assert_close(ours, theirs(model, token_ids(320)))


def test_gguf_without_an_output_matrix_is_tied(strata_logits, tmp_path):
    model = llama(tie_word_embeddings=True)
    write_gguf(tmp_path / "tied.gguf", model, Type.F32)
    ours = strata_logits(tmp_path / "tied.gguf", token_ids(320).tolist())
    assert_close(ours, theirs(model, token_ids(320)))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
def test_gguf_agrees_with_the_reader_in_transformers(strata_logits, tmp_path, kind):
    """Names, row orders and configuration as somebody else understands them."""
    theta = {"rope_type": "default", "rope_theta": 500.0}
    model = llama(rope_parameters=theta, rms_norm_eps=1e-3, num_attention_heads=8)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, Type[kind], vocabulary=spoken_bytes)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    assert read.config.num_key_value_heads == KEY_HEADS
    ours = strata_logits(file, token_ids(320).tolist())
    assert_close(ours, theirs(read.eval(), token_ids(320)))


def spoken_bytes(writer, size=320):
    """A sentencepiece vocabulary of marks, bytes and unused pieces."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    byte = [(f"<0x{b:02X}>", 6) for b in range(256)]
    rest = [(f"piece{i}", 1) for i in range(size - 259)]
    tokens = special + byte + rest
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(size - 259)])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


# ---------------------------------------------------------------------------------- tokenizers

TEXT = (
    "Once upon a time, there was a little girl named Lily. She didn't like 12 big dogs!\n"
    "  Two  spaces, a tab\tand the rest: naïve café — 東京 🙂.\n\n\"Yes,\" said Tom. It's 3:45."  # no newline at the end, which tokenizer.json takes off
)


def measure(strata, model, text):
    out = strata(
        "eval", model, "--task", "perplexity", "--text", text, "--window", 64, "--stride", 32,
        "--json",
    )
    result = json.loads(out)
    return result["tokens"], result["perplexity"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """stories260k in directories that carry only one form of its tokenizer."""
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.json"):
        if not (STORIES / name).exists():
            pytest.skip(f"skipped: {STORIES / name} is not there")
    root = tmp_path_factory.mktemp("stories")

    def only(*tokenizer):
        path = root / "-".join(tokenizer)
        if not path.exists():
            path.mkdir()
            for name in ("config.json", "model.safetensors", *tokenizer):
                shutil.copy(STORIES / name, path / name)
        return path

    return only


def test_a_sentencepiece_model_tokenises_like_its_tokenizer_json(strata, stories, text):
    both = [
        measure(strata, stories(*files), text)
        for files in [
            ("tokenizer.json", "tokenizer_config.json"),
            ("tokenizer.model", "tokenizer_config.json"),
            ("tokenizer.model",),
        ]
    ]
    assert both[0] == both[1] == both[2]


def test_token_counts_are_those_of_sentencepiece(strata, stories, text):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(str(STORIES / "tokenizer.model"))
    count = 1 + len(pieces.encode(TEXT))  # and the begin mark
    path = stories("tokenizer.model")
    out = json.loads(strata(
        "eval", path, "--task", "perplexity", "--text", text, "--window", 512, "--stride", 512,
        "--json",
    ))
    # The first token is not predicted.
    assert out["tokens"] == count - 1


def test_the_sentencepiece_vocabulary_in_gguf(strata, stories, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(str(STORIES / "tokenizer.model"))
    model = LlamaForCausalLM.from_pretrained(stories("tokenizer.model"), dtype=torch.float32)

    def vocabulary(writer):
        count = range(pieces.vocab_size())
        kinds = [
            2 if pieces.IsUnknown(i) else 3 if pieces.IsControl(i)
            else 6 if pieces.IsByte(i) else 5 if pieces.IsUnused(i) else 1
            for i in count
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.IdToPiece(i) for i in count])
        writer.add_token_scores([pieces.GetScore(i) for i in count])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_add_bos_token(True)

    write_gguf(tmp_path / "stories.gguf", model, Type.F32, vocabulary)
    # The rule of this vocabulary that joins neighbouring spaces has no place in a GGUF file.
    text = tmp_path / "text.txt"
    text.write_text(re.sub(" +", " ", TEXT.replace("\n ", "\n")))
    tokens, perplexity = measure(strata, tmp_path / "stories.gguf", text)
    expected = measure(strata, stories("tokenizer.json", "tokenizer_config.json"), text)
    assert tokens == expected[0]
    assert abs(perplexity / expected[1] - 1) < 1e-5


def test_a_byte_level_vocabulary_in_three_forms(strata, text, tmp_path):
    """tokenizer.json, vocab.json with merges.txt, and GGUF tokenise alike."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    assert tokenizer.get_vocab_size() == 320
    count = len(tokenizer.encode(TEXT).ids)
    model = llama(bos_token_id=0, eos_token_id=0)

    as_json = tmp_path / "json"
    model.save_pretrained(as_json)
    tokenizer.save(str(as_json / "tokenizer.json"))
    as_files = tmp_path / "files"
    model.save_pretrained(as_files)
    tokenizer.model.save(str(as_files))
    assert (as_files / "vocab.json").exists() and (as_files / "merges.txt").exists()

    parts = json.loads(tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    texts = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)

    def vocabulary(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(texts)
        writer.add_token_types([3] + [1] * 319)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)

    as_gguf = tmp_path / "tiny.gguf"
    write_gguf(as_gguf, model, Type.F32, vocabulary)
    first, second, third = (measure(strata, m, text) for m in (as_json, as_files, as_gguf))
    assert first[0] == second[0] == third[0]
    assert first[1] == pytest.approx(second[1], rel=1e-6)
    assert first[1] == pytest.approx(third[1], rel=1e-6)
    whole = json.loads(strata(
        "eval", as_gguf, "--task", "perplexity", "--text", text, "--window", 4096, "--json"
    ))
    assert whole["tokens"] <= count


# ------------------------------------------------------------------------ quantised checkpoints


def weight_arguments(bits, group_size, symmetric):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric,
        strategy="group" if group_size else "channel", group_size=group_size,
    )


def quantise_with_compressed_tensors(model, path, groups, ignore=("lm_head",)):
    """Round to nearest with the library's own observer formulas, compressor and config.

    `groups` maps targets to weight arguments.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig, QuantizationScheme, QuantizationStatus, apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    schemes = {
        f"group_{i}": QuantizationScheme(targets=list(targets), weights=arguments)
        for i, (targets, arguments) in enumerate(groups)
    }
    config = QuantizationConfig(
        config_groups=schemes, ignore=list(ignore), quantization_status="frozen",
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    touched = 0
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        rows, columns = module.weight.shape
        width = scheme.weights.group_size or columns
        blocks = module.weight.detach().reshape(rows, columns // width, width)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
        touched += 1
    assert touched > 0
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


def assert_packed(path, count):
    names = load_file(path / "model.safetensors")
    assert sum(name.endswith("weight_packed") for name in names) == count


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "bits,group_size", [(4, 128), (4, 32), (8, 64), (4, None), (8, None), (3, 64), (2, 32)]
)
def test_compressed_tensors_checkpoints(strata_logits, tmp_path, bits, group_size, symmetric):
    pytest.importorskip("compressed_tensors")
    arguments = weight_arguments(bits, group_size, symmetric)
    path = tmp_path / "packed"
    quantise_with_compressed_tensors(llama(), path, [(["Linear"], arguments)])
    assert_packed(path, 14)
    expected = theirs(read_back(path), token_ids(320))
    assert_close(strata_logits(path, token_ids(320).tolist()), expected, 1e-3)


def test_compressed_tensors_with_two_grids_and_ignored_layers(strata_logits, tmp_path):
    pytest.importorskip("compressed_tensors")
    path = tmp_path / "packed"
    groups = [
        (["re:.*mlp.*"], weight_arguments(4, 32, False)),
        (["re:.*self_attn.*"], weight_arguments(8, 64, True)),
    ]
    ignore = ("lm_head", "model.layers.0.mlp.down_proj", "re:.*k_proj")
    quantise_with_compressed_tensors(llama(), path, groups, ignore)
    assert_packed(path, 11)
    expected = theirs(read_back(path), token_ids(320))
    assert_close(strata_logits(path, token_ids(320).tolist()), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W4A16_ASYM"])
def test_llm_compressor_checkpoints(strata_logits, tmp_path, scheme, dtype):
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    llama().to(dtype).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    path = tmp_path / "packed"
    model.save_pretrained(path, save_compressed=True)
    assert_packed(path, 14)
    expected = theirs(read_back(path), token_ids(320))
    assert_close(strata_logits(path, token_ids(320).tolist()), expected, 1e-3)
