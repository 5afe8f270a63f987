//! Residual networks for small images (He et al. 2016, section 4.2): 6n + 2 layers, three stages of
//! n blocks, a 3 x 3 stem, global average pooling.
//!
//! The depth and the widths are read from the tensors themselves, so that a bare PyTorch file works
//! as well as a directory with a config. Shortcuts that change the shape have no parameters
//! (option A) or are a convolution with its norm (option B, `shortcut.0`/`.1` or `downsample.0`/`.1`).

use serde_json::Value;
use store::Checkpoint;
use tensor::Tensor;
use tensor::ops::{self, BatchNorm, Conv2d, Moments};

use crate::images::{check_state, expect, image_size, rows_of_pixels};
use crate::keys::Keys;
use crate::network::{ImageSpec, Input, Mode, Network, Observed, State, no_segment};
use crate::{Error, Leaf, Name, Result, Role, Spelling, Weights};

/// PyTorch's default, which all of these checkpoints use.
const EPS: f32 = 1e-5;
/// Weight of a new batch in running statistics (PyTorch's default).
const MOMENTUM: f32 = 0.1;
/// Largest number of blocks in a stage that is believed.
const MAX_BLOCKS: usize = 2000;
/// Channel means and deviations of the usual CIFAR preprocessing (those of ImageNet).
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// A convolution and the batch normalisation behind it.
#[derive(Clone, Debug)]
struct ConvNorm {
    conv: Name,
    norm: Name,
    stride: usize,
}

#[derive(Clone, Debug)]
struct Block {
    first: ConvNorm,
    second: ConvNorm,
    /// Option B.
    shortcut: Option<ConvNorm>,
}

/// A residual network as a description. Segment 0 is the stem, every further segment a block.
#[derive(Clone, Debug)]
pub struct ResNet {
    images: ImageSpec,
    stem: ConvNorm,
    blocks: Vec<Block>,
    head: Name,
}

impl ResNet {
    /// The network of `6 n + 2` layers with `n` blocks in each of three stages of 16, 32 and 64
    /// channels, for colour images of 32 x 32 in `classes` classes; option A.
    ///
    /// # Errors
    /// A depth that is not `6 n + 2`, or no classes.
    pub fn cifar(depth: usize, classes: usize) -> Result<Self> {
        let n = depth.saturating_sub(2) / 6;
        if n == 0 || depth != 6 * n + 2 || n > MAX_BLOCKS {
            return Err(Error::config(
                "depth",
                format!("{depth} is not 6 n + 2 (20, 32, 44, 56, ...)"),
            ));
        }
        if classes == 0 {
            return Err(Error::config("num_classes", "is 0"));
        }
        let stage = |filters, stride| Stage { filters, blocks: n, stride, shortcut: None };
        let images = cifar_images(3);
        let stages = [stage(16, 1), stage(32, 2), stage(64, 2)];
        Ok(Self::build("", images, 16, &stages, "linear", classes))
    }

    /// Whether the checkpoint's names are those of such a network.
    pub(crate) fn is_here(checkpoint: &Checkpoint) -> bool {
        prefix(checkpoint).is_some()
    }

    /// Reads depth, widths and shortcuts from the tensors of a checkpoint, and what its config (if
    /// it has one) says about images.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit together, a config that says something else.
    pub fn from_checkpoint(checkpoint: &Checkpoint, config: &Value) -> Result<Self> {
        let Some(prefix) = prefix(checkpoint) else {
            return Err(Error::Missing {
                name: "layer1.0.conv1.weight".into(),
                hint: "a residual network has conv1, bn1 and layer1.0.conv1".into(),
            });
        };
        let [width, channels] = convolution(checkpoint, &format!("{prefix}conv1"), 3)?;
        let mut images = cifar_images(channels);
        if let Some(size) = image_size(config, "image_size")? {
            [images.height, images.width] = size;
        }
        let images = images.described(config, checkpoint)?;
        let stages = stages(checkpoint, &prefix, width)?;
        let head = ["linear", "fc"]
            .into_iter()
            .find(|h| checkpoint.contains(&format!("{prefix}{h}.weight")));
        let Some(head) = head else {
            return Err(Error::Missing {
                name: format!("{prefix}linear.weight"),
                hint: "the classifier is called linear or fc".into(),
            });
        };
        let shape = &checkpoint.info(&format!("{prefix}{head}.weight"))?.shape;
        let classes = shape.first().copied().filter(|&n| n > 0 && shape.len() == 2);
        let classes = classes.ok_or_else(|| Error::Shape {
            name: format!("{prefix}{head}.weight"),
            found: shape.clone(),
            expected: vec![10, stages.last().map_or(0, |s| s.filters)],
        })?;
        let network = Self::build(&prefix, images, width, &stages, head, classes);
        network.check(checkpoint)?;
        network.agrees(config)?;
        Ok(network)
    }

    fn build(
        prefix: &str,
        images: ImageSpec,
        width: usize,
        stages: &[Stage],
        head: &str,
        classes: usize,
    ) -> Self {
        let conv =
            |module: String, role, block, [filters, channels]: [usize; 2], size: usize| Name {
                module,
                role,
                block,
                transposed: false,
                shape: [filters, channels * size * size],
                kernel: Some([size, size]),
                spelling: Spelling::Dotted,
                bias: false,
                plus_one: false,
            };
        let unit = |conv: Name, norm: String, stride| ConvNorm {
            norm: Name {
                module: norm,
                role: Role::BatchNorm,
                shape: [conv.shape[0], 1],
                kernel: None,
                bias: true,
                ..conv.clone()
            },
            conv,
            stride,
        };
        let stem = conv(format!("{prefix}conv1"), Role::Stem, None, [width, images.channels], 3);
        let mut blocks = Vec::new();
        let mut channels = width;
        for (s, stage) in stages.iter().enumerate() {
            for b in 0..stage.blocks {
                let at = format!("{prefix}layer{}.{b}", s + 1);
                let index = Some(blocks.len());
                let stride = if b == 0 { stage.stride } else { 1 };
                let one = |n: usize, channels, stride| {
                    let shape = [stage.filters, channels];
                    let name = conv(format!("{at}.conv{n}"), Role::Conv, index, shape, 3);
                    unit(name, format!("{at}.bn{n}"), stride)
                };
                let shortcut = stage.shortcut.filter(|_| b == 0).map(|name| {
                    let shape = [stage.filters, channels];
                    let conv = conv(format!("{at}.{name}.0"), Role::Shortcut, index, shape, 1);
                    unit(conv, format!("{at}.{name}.1"), stride)
                });
                let first = one(1, channels, stride);
                channels = stage.filters;
                blocks.push(Block { first, second: one(2, channels, 1), shortcut });
            }
        }
        ResNet {
            images,
            stem: unit(stem, format!("{prefix}bn1"), 1),
            blocks,
            head: Name {
                module: format!("{prefix}{head}"),
                role: Role::Head,
                block: None,
                transposed: false,
                shape: [classes, channels],
                kernel: None,
                spelling: Spelling::Dotted,
                bias: true,
                plus_one: false,
            },
        }
    }

    /// Layers with weights on the longest path: what the name "ResNet-20" counts.
    pub fn depth(&self) -> usize {
        2 * self.blocks.len() + 2
    }

    /// Refuses a config that describes another network.
    fn agrees(&self, config: &Value) -> Result<()> {
        let keys = Keys(config);
        let stated = [
            ("depth", self.depth(), keys.optional_size("depth")?),
            ("num_classes", self.head.shape[0], crate::images::stated_classes(config)?),
            ("channels", self.images.channels, keys.optional_size("channels")?),
        ];
        for (key, found, stated) in stated {
            if let Some(stated) = stated.filter(|&s| s != found) {
                return Err(Error::config(
                    key,
                    format!("is {stated}, but the tensors say {found}"),
                ));
            }
        }
        Ok(())
    }

    /// Convolution, batch normalisation, what is added, and relu where asked for.
    fn unit(
        &self,
        unit: &ConvNorm,
        w: &dyn Weights,
        state: &mut State,
        input: (Tensor<2>, [usize; 3]),
        residual: Option<Tensor<2>>,
        relu: bool,
    ) -> Result<(Tensor<2>, [usize; 3])> {
        let (x, [images, height, width]) = input;
        let [kernel, _] = unit.conv.kernel.unwrap_or([1, 1]);
        let spec = Conv2d {
            images,
            height,
            width,
            channels: unit.conv.shape[1] / (kernel * kernel),
            filters: unit.conv.shape[0],
            kernel: [kernel, kernel],
            stride: unit.stride,
            padding: kernel / 2,
        };
        let moments = match state.mode {
            Mode::Train => Moments::Batch,
            Mode::Evaluate => Moments::Given {
                mean: w.vector(&unit.norm, Leaf::RunningMean)?,
                variance: w.vector(&unit.norm, Leaf::RunningVar)?,
            },
        };
        let norm = BatchNorm {
            gain: w.vector(&unit.norm, Leaf::Weight)?,
            bias: w.vector(&unit.norm, Leaf::Bias)?,
            moments,
            eps: EPS,
        };
        let weight = w.matrix(&unit.conv)?;
        let [tall, wide] = spec.out();
        let (y, seen) = ops::conv2d_norm(x, weight, &spec, norm, residual, relu);
        if let Some((mean, mut variance)) = seen {
            let rows = spec.out_rows() as f32;
            variance.iter_mut().for_each(|v| *v *= rows / (rows - 1.0).max(1.0));
            let module = unit.norm.module.clone();
            state.observed.push(Observed { module, mean, variance, momentum: MOMENTUM });
        }
        Ok((y, [images, tall, wide]))
    }

    fn block(
        &self,
        block: &Block,
        w: &dyn Weights,
        state: &mut State,
    ) -> Result<(Tensor<2>, [usize; 3])> {
        let shape = geometry(&state.shape)?;
        let x = state.x.clone();
        let [filters, channels] = [block.second.conv.shape[0], x.dims()[1]];
        let stride = block.first.stride;
        let shortcut = match &block.shortcut {
            Some(unit) => self.unit(unit, w, state, (x.clone(), shape), None, false)?.0,
            None if stride == 1 && filters == channels => x.clone(),
            None => {
                let before = filters.saturating_sub(channels) / 2;
                ops::subsample(x.clone(), shape, stride, before, filters)
            }
        };
        let inner = self.unit(&block.first, w, state, (x, shape), None, true)?;
        self.unit(&block.second, w, state, inner, Some(shortcut), true)
    }
}

/// `[images, height, width]` of a state.
fn geometry(shape: &[usize]) -> Result<[usize; 3]> {
    shape.try_into().map_err(|_| Error::Shape {
        name: "state of a residual network (images, height, width)".into(),
        found: shape.to_vec(),
        expected: vec![0; 3],
    })
}

fn cifar_images(channels: usize) -> ImageSpec {
    let mut images = ImageSpec::new(channels, 32, 32);
    if channels == 3 {
        (images.mean, images.deviation) = (MEAN.to_vec(), DEVIATION.to_vec());
    }
    images
}

/// One stage as the tensors show it.
struct Stage {
    filters: usize,
    blocks: usize,
    stride: usize,
    /// Name of option B's shortcut.
    shortcut: Option<&'static str>,
}

/// What stands before `conv1`, `bn1` and `layer1.0.conv1`.
fn prefix(checkpoint: &Checkpoint) -> Option<String> {
    let mut prefixes: Vec<&str> = checkpoint
        .names()
        .filter_map(|name| name.strip_suffix("layer1.0.conv1.weight"))
        .filter(|p| p.is_empty() || p.ends_with('.'))
        .collect();
    prefixes.sort_by_key(|p| p.len());
    prefixes
        .into_iter()
        .find(|p| {
            checkpoint.contains(&format!("{p}conv1.weight"))
                && checkpoint.contains(&format!("{p}bn1.running_mean"))
        })
        .map(str::to_string)
}

/// Filters and channels of a convolution with a square kernel of `size`.
fn convolution(checkpoint: &Checkpoint, module: &str, size: usize) -> Result<[usize; 2]> {
    let name = format!("{module}.weight");
    let shape = &checkpoint.info(&name)?.shape;
    match shape[..] {
        [filters, channels, h, w] if filters > 0 && channels > 0 && h == size && w == size => {
            Ok([filters, channels])
        }
        _ => Err(Error::Shape { name, found: shape.clone(), expected: vec![16, 3, size, size] }),
    }
}

fn stages(checkpoint: &Checkpoint, prefix: &str, width: usize) -> Result<Vec<Stage>> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut channels = width;
    loop {
        let at = format!("{prefix}layer{}", stages.len() + 1);
        let has = |rest: &str| checkpoint.contains(&format!("{at}.{rest}.weight"));
        if !has("0.conv1") {
            break;
        }
        if has("0.conv3") {
            return Err(Error::Weights {
                name: format!("{at}.0.conv3"),
                reason: "bottleneck blocks are not known; known are blocks of two 3 x 3 \
                         convolutions (ResNet-20, -32, -44, -56, ...)"
                    .into(),
            });
        }
        let [filters, _] = convolution(checkpoint, &format!("{at}.0.conv1"), 3)?;
        let blocks = (0..=MAX_BLOCKS).take_while(|b| has(&format!("{b}.conv1"))).count();
        if blocks > MAX_BLOCKS || filters < channels {
            return Err(Error::Weights {
                name: at,
                reason: format!("{blocks} blocks of {filters} channels after {channels}"),
            });
        }
        let shortcut =
            ["shortcut", "downsample"].into_iter().find(|name| has(&format!("0.{name}.0")));
        let stride = if stages.is_empty() { 1 } else { 2 };
        stages.push(Stage { filters, blocks, stride, shortcut });
        channels = filters;
    }
    Ok(stages)
}

impl Network for ResNet {
    fn family(&self) -> &str {
        "resnet"
    }

    fn modules(&self) -> Vec<&Name> {
        let blocks =
            self.blocks.iter().flat_map(|b| b.shortcut.iter().chain([&b.first, &b.second]));
        let units = [&self.stem].into_iter().chain(blocks);
        units.flat_map(|u| [&u.conv, &u.norm]).chain([&self.head]).collect()
    }

    fn layers(&self) -> Vec<(usize, Name)> {
        let mut layers = vec![(0, self.stem.conv.clone())];
        for (i, block) in self.blocks.iter().enumerate() {
            let units = block.shortcut.iter().chain([&block.first, &block.second]);
            layers.extend(units.map(|unit| (i + 1, unit.conv.clone())));
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

    fn segment(&self, i: usize, w: &dyn Weights, mut state: State) -> Result<State> {
        let unit = match i.checked_sub(1) {
            None => &self.stem,
            Some(block) => {
                &self.blocks.get(block).ok_or_else(|| no_segment(i, self.segments()))?.first
            }
        };
        let channels = unit.conv.shape[1] / 9;
        check_state(&format!("segment {i}"), &state.x, &state.shape, 3, channels)?;
        let (x, shape) = match i.checked_sub(1).and_then(|block| self.blocks.get(block)) {
            None => {
                let input = (state.x.clone(), geometry(&state.shape)?);
                self.unit(&self.stem, w, &mut state, input, None, true)?
            }
            Some(block) => self.block(block, w, &mut state)?,
        };
        Ok(state.with(x, shape.to_vec()))
    }

    fn exit(&self, w: &dyn Weights, state: State) -> Result<Tensor<2>> {
        check_state("exit", &state.x, &state.shape, 3, self.head.shape[1])?;
        let [_, height, width] = geometry(&state.shape)?;
        w.linear(&self.head, ops::mean_pool(state.x, height * width))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_network;
    use crate::{CheckpointWeights, open_network};
    use tensor::host;

    #[test]
    fn every_depth_is_read_from_the_names() {
        for n in [3, 5, 7, 9] {
            let dir = tempfile::tempdir().unwrap();
            let network = ResNet::cifar(6 * n + 2, 10).unwrap();
            random_network(dir.path(), &network, None, 1).unwrap();
            let model = open_network(dir.path()).unwrap();
            assert_eq!((model.network.family(), model.network.segments()), ("resnet", 3 * n + 1));
            assert_eq!(model.network.layers().len(), 6 * n + 2);
            let pixels = vec![0.5; 2 * 3 * 32 * 32];
            let input = Input::Images { pixels: &pixels, shape: [2, 3, 32, 32] };
            let logits = model.network.predict(model.weights.as_ref(), &input).unwrap();
            assert_eq!(logits.dims(), [2, 10]);
            assert!(host::into_vec(logits).iter().all(|v| v.is_finite()));
        }
        assert!(ResNet::cifar(21, 10).unwrap_err().to_string().contains("6 n + 2"));
    }

    #[test]
    fn an_image_does_not_see_its_neighbours_and_segments_restart() {
        let dir = tempfile::tempdir().unwrap();
        let network = ResNet::cifar(8, 4).unwrap();
        random_network(dir.path(), &network, None, 2).unwrap();
        let w = CheckpointWeights::new(Checkpoint::open(dir.path()).unwrap()).unwrap();
        let pixels: Vec<f32> =
            (0..2 * 3072).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let both = Input::Images { pixels: &pixels, shape: [2, 3, 32, 32] };
        let second = Input::Images { pixels: &pixels[3072..], shape: [1, 3, 32, 32] };
        let logits = host::into_vec(network.predict(&w, &both).unwrap());
        assert_eq!(logits[4..], host::into_vec(network.predict(&w, &second).unwrap()));
        let mut state = network.enter(&w, &both).unwrap();
        for i in 0..2 {
            state = network.segment(i, &w, state).unwrap();
        }
        assert_eq!(state.shape, [2, 32, 32]);
        assert_eq!(host::into_vec(network.finish_from(2, &w, state).unwrap()), logits);
        let (trained, observed) = network.train(&w, &both).unwrap();
        assert_ne!(host::into_vec(trained), logits, "batch statistics are others");
        assert_eq!(observed.len(), 7);
    }

    #[test]
    fn option_b_differs_from_option_a() {
        let dir = tempfile::tempdir().unwrap();
        let stage = |filters, stride, shortcut| Stage { filters, blocks: 1, stride, shortcut };
        let stages =
            [stage(4, 1, None), stage(8, 2, Some("downsample")), stage(8, 2, Some("downsample"))];
        let network = ResNet::build("module.", cifar_images(3), 4, &stages, "fc", 3);
        random_network(dir.path(), &network, None, 3).unwrap();
        let model = open_network(dir.path()).unwrap();
        let names: Vec<String> =
            model.network.layers().into_iter().map(|(_, name)| name.module).collect();
        assert_eq!(names[3], "module.layer2.0.downsample.0");
        assert_eq!(names.len(), 1 + 2 + 3 + 3 + 1);
        let pixels = vec![0.25; 3072];
        let input = Input::Images { pixels: &pixels, shape: [1, 3, 32, 32] };
        assert!(model.network.predict(model.weights.as_ref(), &input).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let network = ResNet::cifar(8, 4).unwrap();
        random_network(dir.path(), &network, None, 2).unwrap();
        let w = CheckpointWeights::new(Checkpoint::open(dir.path()).unwrap()).unwrap();
        let wrong = Input::Images { pixels: &[0.0; 12], shape: [1, 3, 2, 2] };
        assert!(network.predict(&w, &wrong).unwrap_err().to_string().contains("[1, 3, 32, 32]"));
        let short = Input::Images { pixels: &[0.0; 12], shape: [1, 3, 32, 32] };
        assert!(network.predict(&w, &short).unwrap_err().to_string().contains("do not fill"));
        let state = State::new(host::from_vec(vec![0.0; 6], [2, 3], &w.device()), vec![1, 1, 1]);
        assert!(network.segment(0, &w, state.clone()).is_err());
        assert!(network.segment(9, &w, state).unwrap_err().to_string().contains("no segment 9"));
        let config = serde_json::json!({"architecture": "ResNetCifar", "depth": 20});
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = open_network(dir.path()).err().unwrap().to_string();
        assert!(error.contains("is 20, but the tensors say 8"), "{error}");
    }

    #[test]
    fn running_statistics_move_by_the_momentum() {
        let seen =
            Observed { module: "bn".into(), mean: vec![1.0], variance: vec![4.0], momentum: 0.1 };
        let (mut mean, mut variance) = ([0.0], [2.0]);
        seen.update(&mut mean, &mut variance);
        assert_eq!((mean[0], variance[0]), (0.1, 2.2));
    }
}
