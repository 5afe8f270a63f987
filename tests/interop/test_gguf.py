"""GGUF files that Strata writes, read by the gguf package and by llama.cpp.

llama.cpp comes as the PyPI package `llama-cpp-python`, which is built on the machine (see
docs/formats.md). Where it is not installed, its tests say so and are skipped.
"""

import ctypes
import json
import pathlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")
SAMPLE = ROOT / "samples" / "almanac-3m"
CHAT = ROOT / "samples" / "almanac-3m-chat"
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]


@pytest.fixture(scope="session")
def llama_cpp():
    try:
        import llama_cpp
    except ImportError:
        pytest.skip(
            "SKIPPED LOUDLY: llama-cpp-python is not installed, so nothing here says whether "
            "llama.cpp reads what Strata writes (pip install llama-cpp-python)"
        )
    return llama_cpp


@pytest.fixture(scope="session")
def convert(strata, tmp_path_factory):
    made = {}

    def run(model, *arguments, to="gguf"):
        key = (str(model), arguments, to)
        if key not in made:
            folder = tmp_path_factory.mktemp("convert")
            out = folder / ("model.gguf" if to == "gguf" else "model")
            strata("convert", model, "--to", to, *arguments, "--out", out)
            made[key] = out
        return made[key]

    return run


@pytest.fixture(scope="session")
def llama(llama_cpp):
    open_models = []

    def run(path, context=512):
        model = llama_cpp.Llama(
            model_path=str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False,
            n_threads=2,
        )
        open_models.append(model)
        return model

    yield run
    for model in open_models:
        model.close()


@pytest.fixture(scope="session")
def documents(strata, tmp_path_factory):
    """Held-out documents of the almanac."""
    out = tmp_path_factory.mktemp("almanac") / "almanac"
    strata("data", "almanac", "--out", out)
    lines = (out / "test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def sample_tokenizer(model=SAMPLE):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


def permuted(weight, heads):
    """Rows of a query or key projection in the order in which GGUF has them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("number", TYPES)
def test_the_gguf_package_reads_every_type(convert, number):
    reader = gguf.GGUFReader(convert(SAMPLE, "--type", number))
    tensors = {t.name: t for t in reader.tensors}
    config = json.loads((SAMPLE / "config.json").read_text())
    plain = load_file(SAMPLE / "model.safetensors")
    assert len(tensors) == len(plain)
    field = reader.fields["general.architecture"]
    assert bytes(field.parts[field.data[0]]).decode() == "llama"
    names = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kinds = set()
    for name, weight in plain.items():
        mine = tensors[names.get_name(name, try_suffixes=(".weight",))]
        kinds.add(mine.tensor_type.name)
        values = weight.float().numpy()
        if name.endswith("q_proj.weight"):
            values = permuted(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = permuted(values, config["num_key_value_heads"])
        read = gguf.quants.dequantize(mine.data, mine.tensor_type).reshape(values.shape)
        if mine.tensor_type.name in ("F32", "F16"):
            assert np.array_equal(read, values), name
            continue
        try:
            theirs = gguf.quants.quantize(np.ascontiguousarray(values), mine.tensor_type)
            assert np.array_equal(theirs.view(np.uint8).ravel(), mine.data.view(np.uint8).ravel()), name
        except NotImplementedError:
            # K-quants: the package only decodes them.
            error = np.linalg.norm(read - values) / np.linalg.norm(values)
            assert error < {"Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02}[mine.tensor_type.name], name
    assert number.upper() in kinds


def test_blocks_are_those_of_ggml(convert, llama_cpp):
    """The compiled quantisers of ggml, K-quants included, on the weights of the sample."""
    library = pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [
        ctypes.c_void_p
    ]
    original = {t.name: t for t in gguf.GGUFReader(convert(SAMPLE, "--type", "f32")).tensors}
    for number in ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]:
        blocks = same = 0
        for tensor in gguf.GGUFReader(convert(SAMPLE, "--type", number)).tensors:
            if tensor.tensor_type.name == "F32":
                continue
            values = np.ascontiguousarray(original[tensor.name].data, dtype=np.float32)
            mine = np.ascontiguousarray(tensor.data).view(np.uint8).ravel()
            theirs = np.zeros_like(mine)
            rows, width = values.shape
            size = chunk(
                int(tensor.tensor_type), values.ctypes.data, theirs.ctypes.data, 0, rows, width, None
            )
            assert size == len(mine)
            block = gguf.constants.GGML_QUANT_SIZES[tensor.tensor_type][1]
            equal = (mine == theirs).reshape(-1, block).all(1)
            blocks += len(equal)
            same += equal.sum()
        # A compiled ggml fuses multiply and add, which may tip a near tie of the scale search.
        assert same / blocks > (0.999 if number.endswith("_k") else 1.0 - 1e-12), number


def test_tokens_are_those_of_llama_cpp(convert, llama, documents):
    model = llama(convert(SAMPLE, "--type", "f16"))
    tokenizer = sample_tokenizer()
    assert model.n_vocab() == 2048
    for text in documents[:500]:
        # llama.cpp puts no space before a text for byte-level BPE; this tokenizer does.
        ids = model.tokenize((" " + text).encode(), add_bos=True)
        assert ids == tokenizer.encode(text).ids, text
    assert model.detokenize(ids).decode().strip() == text


def test_a_chat_stays_a_chat(convert, llama):
    model = llama(convert(CHAT, "--type", "f16"))
    config = json.loads((CHAT / "tokenizer_config.json").read_text())
    assert model.metadata["tokenizer.chat_template"] == config["chat_template"]
    tokenizer = sample_tokenizer(CHAT)
    text = "<|user|> Where is Gakdale?<|end|><|assistant|>"
    ids = model.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == tokenizer.encode(text).ids
    assert [model.token_bos(), model.token_eos()] == [0, 1]
    # Greedy decoding of both programs, token by token.
    out = []
    for token in model.generate(ids, temp=0.0):
        out.append(token)
        if token in (1, 6) or len(out) == 24:
            break
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    with torch.no_grad():
        best = reference(torch.tensor([ids + out])).logits[0].argmax(-1).tolist()
    assert out == best[len(ids) - 1 : -1]


def mean_loss(logits, ids):
    logits, ids = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(ids)
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


@pytest.mark.parametrize("number", ["f16", "q8_0", "q4_0", "q4_k"])
@pytest.mark.parametrize("sample", [SAMPLE, CHAT], ids=["base", "chat"])
def test_perplexity_agrees(convert, llama, strata_logits, documents, sample, number):
    path = convert(sample, "--type", number)
    tokenizer = sample_tokenizer(sample)
    ids = [i for text in documents for i in [*tokenizer.encode(text).ids, 1]]
    windows = [ids[at : at + 256] for at in range(0, 12 * 256, 256)]
    model = llama(path)
    ours = strata_logits(path, windows)
    losses = []
    for window, mine in zip(windows, ours):
        model.reset()
        model.eval(window)
        theirs = np.array(model.scores[: len(window)])
        losses.append((mean_loss(theirs, window), mean_loss(mine, window)))
    theirs, mine = np.exp(np.mean(losses, axis=0))
    assert abs(theirs - mine) < 0.01 * theirs, (theirs, mine)


def test_a_sentencepiece_model(convert, llama, strata_logits):
    source = SHARED / "data" / "stories260k"
    if not source.exists():
        pytest.skip(f"no {source}")
    path = convert(source, "--type", "f16")
    model = llama(path)
    tokenizer = sample_tokenizer(source)
    for text in ["Once upon a time, there was a girl.", "été 🦀\n0123", "It's big"]:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text).ids, text
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily.").ids
    model.eval(ids)
    theirs = torch.tensor(np.array(model.scores[: len(ids)]))
    assert (theirs - strata_logits(path, [ids])[0]).abs().max() < 0.05


BASE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GPT2 = dict(
    vocab_size=64, n_embd=64, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)
FAMILIES = {
    "llama": ("Llama", BASE),
    "llama-biases-tied": (
        "Llama", {**BASE, "attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    "llama3": ("Llama", {**BASE, "rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {**BASE, "rope_parameters": dict(rope_type="linear", rope_theta=500.0, factor=4.0)}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 64}),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {**BASE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
         "tie_word_embeddings": True, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2", GPT2),
    "neox-parallel": ("GPTNeoX", {**BASE, "rotary_pct": 0.5}),
    "neox-sequential": ("GPTNeoX", {**BASE, "rotary_pct": 1.0, "use_parallel_residual": False}),
}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    def make(case):
        import transformers

        name, options = FAMILIES[case]
        torch.manual_seed(3)
        config = getattr(transformers, f"{name}Config")(**options)
        config._attn_implementation = "eager"  # the others ignore soft caps
        model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
            config
        ).eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(0.2 * torch.randn_like(weight))
        path = tmp_path_factory.mktemp("family") / case
        model.save_pretrained(path)
        return path, model

    return make


@pytest.mark.parametrize("case", FAMILIES)
def test_llama_cpp_computes_every_family(strata, family, llama, tmp_path, case):
    source, model = family(case)
    path = tmp_path / "model.gguf"
    strata("convert", source, "--to", "gguf", "--without-tokenizer", "--out", path)
    ids = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(4)).tolist()
    theirs = llama(path, 64)
    theirs.eval(ids)
    theirs = torch.tensor(np.array(theirs.scores[: len(ids)]))
    with torch.no_grad():
        reference = model(torch.tensor([ids])).logits[0]
    # llama.cpp keeps keys and values in half precision.
    assert (theirs - reference).abs().max() < 0.02 * reference.abs().max()


@pytest.mark.parametrize("case", FAMILIES)
def test_strata_reads_back_what_it_wrote(strata, family, strata_logits, tmp_path, case):
    source, _ = family(case)
    path = tmp_path / "model.gguf"
    strata("convert", source, "--to", "gguf", "--without-tokenizer", "--out", path)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4)).tolist()
    difference = (strata_logits(path, ids) - strata_logits(source, ids)).abs().max()
    assert difference < 1e-4


def test_codes_of_a_grid_reach_llama_cpp(strata, convert, llama, strata_logits, documents, tmp_path):
    """GPTQ's codes in Q4_0 blocks: llama.cpp computes with exactly these weights."""
    packed = tmp_path / "packed"
    strata(
        "quantize", SAMPLE, "--method", "rtn", "--bits", 4, "--group-size", 64, "--symmetric",
        "--format", "gptq", "--no-evaluate", "--out", packed,
    )
    path = convert(packed)
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(path).tensors]
    assert kinds.count("Q4_0") == 28
    ids = sample_tokenizer().encode(documents[0]).ids
    ours = strata_logits(packed, [ids])[0]
    assert (strata_logits(path, [ids])[0] - ours).abs().max() < 1e-3
    model = llama(path)
    model.eval(ids)
    theirs = np.array(model.scores[: len(ids)])
    assert abs(mean_loss(theirs, ids) - mean_loss(ours, ids)) < 0.01
