//! Vision transformers: patches as tokens, blocks of bidirectional attention, a linear classifier.
//!
//! Two layouts are known. Hugging Face's `ViTForImageClassification` (Dosovitskiy et al. 2021):
//! class token, pre-norm blocks, the class token is classified. And small transformers in the names
//! of `torch.nn` (`patch_embed`, `encoder.0.attn.in_proj_weight`, ...): no class token, post-norm
//! blocks, the mean of all tokens is classified.

use serde_json::Value;
use store::Checkpoint;
use tensor::Tensor;
use tensor::ops::{self, Activation, AttentionSpec, Conv2d};

use crate::images::{channels, check_state, expect, image_size, rows_of_pixels, stated_classes};
use crate::keys::Keys;
use crate::network::{ImageSpec, Input, Network, State, no_segment};
use crate::{Error, Leaf, Name, Result, Role, Spelling, Weights};

/// Which token or tokens the classifier reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    ClassToken,
    Mean,
}

#[derive(Clone, Debug)]
struct Block {
    norm1: Name,
    norm2: Name,
    /// Query, key and value, or all in one.
    qkv: Vec<Name>,
    output: Name,
    up: Name,
    down: Name,
}

/// A vision transformer as a description. Segment 0 makes tokens of patches, every further segment
/// is a block.
#[derive(Clone, Debug)]
pub struct Vit {
    images: ImageSpec,
    /// Height and width of a patch.
    patch: [usize; 2],
    heads: usize,
    eps: f32,
    activation: Activation,
    post_norm: bool,
    pool: Pool,
    class_token: Option<Name>,
    positions: Name,
    projection: Name,
    blocks: Vec<Block>,
    final_norm: Name,
    head: Name,
}

/// Module names of a layout; those of blocks follow `blocks.<i>.`.
struct Table {
    prefix: &'static str,
    class_token: &'static str,
    positions: &'static str,
    projection: &'static str,
    blocks: &'static str,
    norm1: &'static str,
    norm2: &'static str,
    qkv: &'static [&'static str],
    output: &'static str,
    up: &'static str,
    down: &'static str,
    final_norm: &'static str,
}

const HUGGING_FACE: Table = Table {
    prefix: "vit.",
    class_token: "embeddings.cls_token",
    positions: "embeddings.position_embeddings",
    projection: "embeddings.patch_embeddings.projection",
    blocks: "encoder.layer",
    norm1: "layernorm_before",
    norm2: "layernorm_after",
    qkv: &["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    output: "attention.output.dense",
    up: "intermediate.dense",
    down: "output.dense",
    final_norm: "layernorm",
};

const TORCH: Table = Table {
    prefix: "",
    class_token: "",
    positions: "pos_embed",
    projection: "patch_embed.proj",
    blocks: "encoder",
    norm1: "norm1",
    norm2: "norm2",
    qkv: &["attn.in_proj"],
    output: "attn.out_proj",
    up: "ffn.fc1",
    down: "ffn.fc2",
    final_norm: "norm",
};

/// Sizes of a network, as its config says.
struct Sizes {
    hidden: usize,
    inner: usize,
    layers: usize,
    classes: usize,
    qkv_bias: bool,
}

impl Vit {
    /// Reads a `ViTForImageClassification` from its `config.json`.
    ///
    /// # Errors
    /// Values that are missing or impossible, by key.
    pub fn from_config(config: &Value) -> Result<Self> {
        let keys = Keys(config);
        let sizes = Sizes {
            hidden: keys.size("hidden_size")?,
            inner: keys.size("intermediate_size")?,
            layers: keys.layers("num_hidden_layers")?,
            classes: stated_classes(config)?.unwrap_or(2),
            qkv_bias: keys.flag("qkv_bias", true)?,
        };
        let channels = channels(config, "num_channels")?.unwrap_or(3);
        let mut images = ImageSpec::new(channels, 1, 1);
        [images.height, images.width] = image_size(config, "image_size")?.unwrap_or([224; 2]);
        // What the usual preprocessor does where none says otherwise.
        images.mean.fill(0.5);
        images.deviation.fill(0.5);
        let network = Vit {
            patch: image_size(config, "patch_size")?.unwrap_or([16; 2]),
            heads: keys.size("num_attention_heads")?,
            eps: keys.number("layer_norm_eps", 1e-12)? as f32,
            activation: keys.activation("hidden_act", "gelu")?,
            post_norm: false,
            pool: Pool::ClassToken,
            ..Self::skeleton(images)
        };
        network.named(&HUGGING_FACE, &sizes, true)
    }

    /// Reads a transformer in the names of `torch.nn` from its config.
    fn from_torch_config(config: &Value) -> Result<Self> {
        let keys = Keys(config);
        let sizes = Sizes {
            hidden: keys.size("d_model")?,
            inner: keys.size("d_ff")?,
            layers: keys.layers("n_layers")?,
            classes: stated_classes(config)?
                .ok_or_else(|| Error::config("num_classes", "is missing"))?,
            qkv_bias: true,
        };
        let mut images = ImageSpec::new(channels(config, "channels")?.unwrap_or(1), 1, 1);
        let missing = |key: &'static str| move || Error::config(key, "is missing");
        [images.height, images.width] =
            image_size(config, "image_size")?.ok_or_else(missing("image_size"))?;
        let network = Vit {
            patch: image_size(config, "patch_size")?.ok_or_else(missing("patch_size"))?,
            heads: keys.size("n_heads")?,
            eps: keys.number("layer_norm_eps", 1e-5)? as f32,
            activation: Activation::Gelu,
            post_norm: true,
            pool: Pool::Mean,
            ..Self::skeleton(images)
        };
        network.named(&TORCH, &sizes, false)
    }

    /// Reads the network of a checkpoint in either layout and checks its tensors.
    ///
    /// # Errors
    /// As [`Vit::from_config`]; tensors that are missing or have other shapes.
    pub fn from_checkpoint(checkpoint: &Checkpoint, config: &Value) -> Result<Self> {
        let torch = config.get("model_type").is_none();
        let mut network =
            if torch { Self::from_torch_config(config)? } else { Self::from_config(config)? };
        network.images = network.images.described(config, checkpoint)?;
        network.check(checkpoint)?;
        Ok(network)
    }

    /// Names and sizes still missing.
    fn skeleton(images: ImageSpec) -> Self {
        let nothing = name(String::new(), Role::Stem, None, [0, 0]);
        Vit {
            images,
            patch: [1, 1],
            heads: 1,
            eps: 0.0,
            activation: Activation::Gelu,
            post_norm: false,
            pool: Pool::Mean,
            class_token: None,
            positions: nothing.clone(),
            projection: nothing.clone(),
            blocks: Vec::new(),
            final_norm: nothing.clone(),
            head: nothing,
        }
    }

    fn named(mut self, table: &Table, sizes: &Sizes, convolution: bool) -> Result<Self> {
        let Sizes { hidden, inner, layers, classes, qkv_bias } = *sizes;
        let [ph, pw] = self.patch;
        let (height, width) = (self.images.height, self.images.width);
        if !height.is_multiple_of(ph) || !width.is_multiple_of(pw) {
            let reason = format!("{ph} x {pw} does not divide images of {height} x {width}");
            return Err(Error::config("patch_size", reason));
        }
        if ph != pw {
            let reason = format!("patches of {ph} x {pw} are not square");
            return Err(Error::config("patch_size", reason));
        }
        if !hidden.is_multiple_of(self.heads) {
            let reason = format!("{} heads do not divide a width of {hidden}", self.heads);
            return Err(Error::config("num_attention_heads", reason));
        }
        let prefix = table.prefix;
        let outer =
            |module: &str, role, shape| name(format!("{prefix}{module}"), role, None, shape);
        let bare = |n: Name| Name { spelling: Spelling::Bare, bias: false, ..n };
        let class = self.pool == Pool::ClassToken;
        self.class_token =
            class.then(|| bare(outer(table.class_token, Role::ClassToken, [1, hidden])));
        let tokens = (height / ph) * (width / pw) + usize::from(class);
        self.positions = bare(outer(table.positions, Role::Position, [tokens, hidden]));
        let inputs = self.images.channels * ph * pw;
        self.projection = Name {
            kernel: convolution.then_some([ph, pw]),
            ..outer(table.projection, Role::Stem, [hidden, inputs])
        };
        self.final_norm = outer(table.final_norm, Role::FinalNorm, [hidden, 1]);
        self.head = name("classifier".into(), Role::Head, None, [classes, hidden]);
        self.blocks = (0..layers)
            .map(|i| {
                let inside = |module: &str, role, shape| {
                    name(format!("{prefix}{}.{i}.{module}", table.blocks), role, Some(i), shape)
                };
                let qkv = match table.qkv {
                    [fused] => vec![Name {
                        spelling: Spelling::Underscored,
                        ..inside(fused, Role::QueryKeyValue, [3 * hidden, hidden])
                    }],
                    separate => separate
                        .iter()
                        .zip([Role::Query, Role::Key, Role::Value])
                        .map(|(module, role)| inside(module, role, [hidden, hidden]))
                        .map(|n| Name { bias: qkv_bias, ..n })
                        .collect(),
                };
                Block {
                    norm1: inside(table.norm1, Role::Norm1, [hidden, 1]),
                    norm2: inside(table.norm2, Role::Norm2, [hidden, 1]),
                    qkv,
                    output: inside(table.output, Role::Output, [hidden, hidden]),
                    up: inside(table.up, Role::Up, [inner, hidden]),
                    down: inside(table.down, Role::Down, [hidden, inner]),
                }
            })
            .collect();
        Ok(self)
    }

    fn hidden(&self) -> usize {
        self.positions.shape[1]
    }

    /// Tokens per image.
    fn tokens(&self) -> usize {
        self.positions.shape[0]
    }

    fn norm(&self, name: &Name, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        let (gain, bias) = (w.vector(name, Leaf::Weight)?, w.vector(name, Leaf::Bias)?);
        Ok(ops::layer_norm(x, gain, Some(bias), self.eps))
    }

    /// Patches to tokens, class token and positions.
    fn embed(&self, w: &dyn Weights, x: Tensor<2>, images: usize) -> Result<Tensor<2>> {
        let spec = Conv2d {
            images,
            height: self.images.height,
            width: self.images.width,
            channels: self.images.channels,
            filters: self.hidden(),
            kernel: self.patch,
            stride: self.patch[0],
            padding: 0,
        };
        let bias = w.vector(&self.projection, Leaf::Bias)?;
        let patches = ops::conv2d(x, w.matrix(&self.projection)?, Some(bias), &spec);
        let (tokens, hidden) = (self.tokens(), self.hidden());
        let mut x: Tensor<3> = match &self.class_token {
            Some(name) => {
                let class = w.matrix(name)?.unsqueeze::<3>().expand([images, 1, hidden]);
                Tensor::cat(vec![class, patches.reshape([images, tokens - 1, hidden])], 1)
            }
            None => patches.reshape([images, tokens, hidden]),
        };
        x = x + w.matrix(&self.positions)?.unsqueeze::<3>();
        Ok(x.reshape([images * tokens, hidden]))
    }

    fn attention(&self, block: &Block, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        let (rows, hidden) = (x.dims()[0], self.hidden());
        let head_dim = hidden / self.heads;
        let spec = AttentionSpec {
            batch: rows / self.tokens(),
            queries: self.tokens(),
            keys: self.tokens(),
            heads: self.heads,
            kv_heads: self.heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: false,
            offset: 0,
            window: None,
            softcap: None,
        };
        let [q, k, v] = match &block.qkv[..] {
            [query, key, value] => {
                [w.linear(query, x.clone())?, w.linear(key, x.clone())?, w.linear(value, x)?]
            }
            [fused, ..] => {
                let all = w.linear(fused, x)?;
                [0, 1, 2].map(|i| all.clone().narrow(1, i * hidden, hidden))
            }
            [] => return Err(Error::config("num_attention_heads", "the block has no attention")),
        };
        w.linear(&block.output, ops::attention(q, k, v, &spec))
    }

    fn mlp(&self, block: &Block, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        w.linear(&block.down, ops::activate(w.linear(&block.up, x)?, self.activation))
    }

    fn block(&self, block: &Block, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        if self.post_norm {
            let x = x.clone() + self.attention(block, w, x)?;
            let x = self.norm(&block.norm1, w, x)?;
            let x = x.clone() + self.mlp(block, w, x)?;
            return self.norm(&block.norm2, w, x);
        }
        let normed = self.norm(&block.norm1, w, x.clone())?;
        let x = x + self.attention(block, w, normed)?;
        let normed = self.norm(&block.norm2, w, x.clone())?;
        Ok(x + self.mlp(block, w, normed)?)
    }
}

/// A module with a bias.
fn name(module: String, role: Role, block: Option<usize>, shape: [usize; 2]) -> Name {
    Name {
        module,
        role,
        block,
        transposed: false,
        shape,
        kernel: None,
        spelling: Spelling::Dotted,
        bias: true,
        plus_one: false,
    }
}

impl Network for Vit {
    fn family(&self) -> &str {
        "vit"
    }

    fn modules(&self) -> Vec<&Name> {
        let mut all: Vec<&Name> = self.class_token.iter().collect();
        all.extend([&self.positions, &self.projection]);
        for b in &self.blocks {
            all.push(&b.norm1);
            all.extend(&b.qkv);
            all.extend([&b.output, &b.norm2, &b.up, &b.down]);
        }
        all.extend([&self.final_norm, &self.head]);
        all
    }

    fn layers(&self) -> Vec<(usize, Name)> {
        let mut layers = vec![(0, self.projection.clone())];
        for (i, b) in self.blocks.iter().enumerate() {
            let inside = b.qkv.iter().chain([&b.output, &b.up, &b.down]);
            layers.extend(inside.map(|name| (i + 1, name.clone())));
        }
        layers.push((self.segments(), self.head.clone()));
        layers
    }

    fn segments(&self) -> usize {
        self.blocks.len() + 1
    }

    fn classes(&self) -> usize {
        self.head.shape[0]
    }

    fn images(&self) -> Option<&ImageSpec> {
        Some(&self.images)
    }

    fn enter(&self, w: &dyn Weights, input: &Input<'_>) -> Result<State> {
        let (pixels, images) = expect(self.family(), &self.images, input)?;
        let x = rows_of_pixels(pixels, images, &self.images, &w.device());
        Ok(State::new(x, vec![images, self.images.height, self.images.width]))
    }

    fn segment(&self, i: usize, w: &dyn Weights, state: State) -> Result<State> {
        let what = format!("segment {i}");
        let Some(block) = i.checked_sub(1) else {
            check_state(&what, &state.x, &state.shape, 3, self.images.channels)?;
            let images = state.shape.first().copied().unwrap_or(0);
            if state.shape[1..] != [self.images.height, self.images.width] {
                return Err(Error::Input(format!("{what}: images of {:?}", &state.shape[1..])));
            }
            let x = self.embed(w, state.x.clone(), images)?;
            return Ok(state.with(x, vec![images, self.tokens()]));
        };
        let block = self.blocks.get(block).ok_or_else(|| no_segment(i, self.segments()))?;
        self.check_tokens(&what, &state)?;
        let x = self.block(block, w, state.x.clone())?;
        let shape = state.shape.clone();
        Ok(state.with(x, shape))
    }

    fn exit(&self, w: &dyn Weights, state: State) -> Result<Tensor<2>> {
        self.check_tokens("exit", &state)?;
        let (images, tokens, hidden) = (state.shape[0], self.tokens(), self.hidden());
        let pooled = match self.pool {
            Pool::ClassToken => {
                let tokens = state.x.reshape([images, tokens, hidden]);
                self.norm(&self.final_norm, w, tokens.narrow(1, 0, 1).reshape([images, hidden]))?
            }
            Pool::Mean => ops::mean_pool(self.norm(&self.final_norm, w, state.x)?, tokens),
        };
        w.linear(&self.head, pooled)
    }
}

impl Vit {
    fn check_tokens(&self, what: &str, state: &State) -> Result<()> {
        check_state(what, &state.x, &state.shape, 2, self.hidden())?;
        if state.shape.get(1) != Some(&self.tokens()) {
            let reason = format!("{what}: {:?} tokens per image", state.shape.get(1));
            return Err(Error::Input(format!("{reason}; the network has {}", self.tokens())));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open_network;
    use crate::testing::random_network;
    use serde_json::json;
    use tensor::host;

    fn config() -> Value {
        json!({
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12, "patch_size": 4,
            "num_channels": 3, "id2label": {"0": "cat", "1": "dog", "2": "owl"},
        })
    }

    #[test]
    fn an_image_does_not_see_its_neighbours_and_segments_restart() {
        let dir = tempfile::tempdir().unwrap();
        let network = Vit::from_config(&config()).unwrap();
        random_network(dir.path(), &network, Some(&config()), 1).unwrap();
        let model = open_network(dir.path()).unwrap();
        let (network, w) = (model.network.as_ref(), model.weights.as_ref());
        assert_eq!((network.family(), network.segments(), network.classes()), ("vit", 3, 3));
        assert_eq!(network.layers().len(), 1 + 2 * 6 + 1);
        assert_eq!(network.images().unwrap().labels, ["cat", "dog", "owl"]);
        let pixels: Vec<f32> = (0..2 * 432).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let both = Input::Images { pixels: &pixels, shape: [2, 3, 12, 12] };
        let second = Input::Images { pixels: &pixels[432..], shape: [1, 3, 12, 12] };
        let logits = host::into_vec(network.predict(w, &both).unwrap());
        let alone = host::into_vec(network.predict(w, &second).unwrap());
        for (a, b) in logits[3..].iter().zip(alone) {
            assert!((a - b).abs() < 1e-5);
        }
        let state = network.segment(0, w, network.enter(w, &both).unwrap()).unwrap();
        assert_eq!(state.shape, [2, 10]);
        assert_eq!(host::into_vec(network.finish_from(1, w, state).unwrap()), logits);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |key: &str, value: Value| {
            let mut config = config();
            config[key] = value;
            Vit::from_config(&config).unwrap_err().to_string()
        };
        assert!(refused("patch_size", json!(5)).contains("does not divide images of 12 x 12"));
        assert!(refused("patch_size", json!([4, 2])).contains("not square"));
        assert!(refused("patch_size", json!(0)).contains("patch_size"));
        assert!(refused("image_size", json!([12])).contains("image_size"));
        assert!(refused("num_attention_heads", json!(5)).contains("5 heads do not divide"));
        assert!(refused("num_channels", json!(1 << 20)).contains("at most 4096"));
        assert!(refused("hidden_act", json!("mish")).contains("mish"));
    }
}
