"""Image networks against transformers and PyTorch, on random models.

Needs torch and transformers, and the example binary:
`cargo build --release -p strata-nn --example image_logits`.
"""

import collections
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from conftest import ROOT, target  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

sys.path.insert(0, str(ROOT / "bench" / "peers"))
from resnet_torch import ResNet  # noqa: E402

TOLERANCE = 1e-4


@pytest.fixture
def image_logits(tmp_path):
    """Logits [n, classes] that Strata computes for pixels [n, c, h, w]."""
    binary = target("examples", "image_logits")
    if not binary.exists():
        pytest.fail(f"{binary} is missing; run: cargo build --release --examples -p strata-nn")

    def run(model, pixels):
        images, out = tmp_path / "images.safetensors", tmp_path / "out.safetensors"
        save_file({"pixels": pixels.contiguous()}, images)
        subprocess.run([binary, model, images, out], check=True)
        return load_file(out)["logits"]

    return run


VITS = {
    "small": {},
    "relu-no-bias": {"hidden_act": "relu", "qkv_bias": False, "num_attention_heads": 2},
    "one-channel-wide": {"num_channels": 1, "image_size": [8, 12], "layer_norm_eps": 1e-5},
    "gelu-tanh": {"hidden_act": "gelu_new", "patch_size": 3},
}


@pytest.mark.parametrize("case", VITS)
def test_vit_agrees_with_transformers(case, tmp_path, image_logits):
    torch.manual_seed(1)
    options = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=12, patch_size=4, num_channels=3, num_labels=7, initializer_range=0.2,
    )
    config = transformers.ViTConfig(**{**options, **VITS[case]})
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases that do nothing would hide mistakes.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "vit")
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(5, config.num_channels, height, width)
    with torch.no_grad():
        wanted = model(pixels).logits
    found = image_logits(tmp_path / "vit", pixels)
    assert (found - wanted).abs().max() < TOLERANCE


def random_resnet(n):
    torch.manual_seed(2)
    model = ResNet(n).eval()
    with torch.no_grad():
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("n", [1, 3, 7])
def test_resnet_agrees_with_pytorch(n, tmp_path, image_logits):
    model = random_resnet(n)
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "ResNetCifar", "depth": 6 * n + 2, "num_classes": 10})
    )
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixels)
    found = image_logits(tmp_path, pixels)
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max().clamp(min=1)


def test_resnet_from_a_bare_training_file(tmp_path, image_logits):
    """A `.th` file as training scripts with DataParallel write it: no config, `module.` names."""
    model = random_resnet(3)
    state = collections.OrderedDict(
        ("module." + name, tensor) for name, tensor in model.state_dict().items()
    )
    path = tmp_path / "resnet20.th"
    torch.save({"state_dict": state, "best_prec1": 91.7}, path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixels)
    found = image_logits(path, pixels)
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max().clamp(min=1)
