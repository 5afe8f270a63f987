//! Names of weights: the checkpoint's own module name plus what the module is for.

/// What a module does in its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Query, key and value in one matrix (see [`crate::config::Qkv`] for its layout).
    QueryKeyValue,
    /// Attention's output projection.
    Output,
    /// The activated branch of a gated MLP.
    Gate,
    /// The linear branch of a gated MLP, or the first layer (`fc1`) of a plain one.
    Up,
    /// The last layer of the MLP (`down_proj`, `fc2`).
    Down,
    /// Token embedding.
    Embed,
    /// Learned position embedding.
    Position,
    /// From the embedding width to the hidden width (OPT-350m).
    ProjectIn,
    /// From the hidden width to the embedding width (OPT-350m).
    ProjectOut,
    /// Output head (the embedding itself when tied).
    Head,
    /// Norm before (or, in post-norm blocks, after) attention.
    Norm1,
    /// Norm on attention's output before it is added (Gemma 2).
    Norm1Post,
    /// Norm before (or, in post-norm blocks, after) the MLP.
    Norm2,
    /// Norm on the MLP's output before it is added (Gemma 2).
    Norm2Post,
    /// Norm before the head.
    FinalNorm,
    /// Norm on every query head (Qwen 3).
    QueryNorm,
    /// Norm on every key head (Qwen 3).
    KeyNorm,
    /// First layer of an image network: the stem convolution, or the projection of patches.
    Stem,
    /// Convolution.
    Conv,
    /// Convolution or projection on a residual network's shortcut.
    Shortcut,
    /// Batch normalisation: gain, bias and running statistics, `[channels]` each.
    BatchNorm,
    /// A learned token that is put before the patches of an image.
    ClassToken,
    /// Linear layer between the last block and the head.
    Pooler,
    /// Linear layer of a plain chain.
    Hidden,
}

impl Role {
    /// Short name for tables.
    pub fn label(self) -> &'static str {
        match self {
            Role::Query => "query",
            Role::Key => "key",
            Role::Value => "value",
            Role::QueryKeyValue => "query_key_value",
            Role::Output => "output",
            Role::Gate => "gate",
            Role::Up => "up",
            Role::Down => "down",
            Role::Embed => "embed",
            Role::Position => "position",
            Role::ProjectIn => "project_in",
            Role::ProjectOut => "project_out",
            Role::Head => "head",
            Role::Norm1 => "norm1",
            Role::Norm1Post => "norm1_post",
            Role::Norm2 => "norm2",
            Role::Norm2Post => "norm2_post",
            Role::FinalNorm => "final_norm",
            Role::QueryNorm => "query_norm",
            Role::KeyNorm => "key_norm",
            Role::Stem => "stem",
            Role::Conv => "conv",
            Role::Shortcut => "shortcut",
            Role::BatchNorm => "batch_norm",
            Role::ClassToken => "class_token",
            Role::Pooler => "pooler",
            Role::Hidden => "hidden",
        }
    }

    /// Whether the module is a norm (its `weight` is a vector).
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Role::Norm1
                | Role::Norm1Post
                | Role::Norm2
                | Role::Norm2Post
                | Role::FinalNorm
                | Role::QueryNorm
                | Role::KeyNorm
                | Role::BatchNorm
        )
    }
}

/// The tensors of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaf {
    /// `<module>.weight`
    Weight,
    /// `<module>.bias`
    Bias,
    /// `<module>.running_mean` of a batch normalisation
    RunningMean,
    /// `<module>.running_var` of a batch normalisation
    RunningVar,
}

/// How the tensors of a module are named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Spelling {
    /// `<module>.weight`, `<module>.bias`
    #[default]
    Dotted,
    /// `<module>_weight`, `<module>_bias` (the fused projection of `torch.nn.MultiheadAttention`)
    Underscored,
    /// `<module>`: a parameter that is no module (class tokens, learned positions of images)
    Bare,
}

/// A module of the checkpoint and what is known about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// The module's name in the checkpoint, e.g. `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// What it is for.
    pub role: Role,
    /// The block it belongs to; `None` outside the blocks.
    pub block: Option<usize>,
    /// Stored as `[in, out]` (GPT-2's `Conv1D`).
    pub transposed: bool,
    /// `[out, in]`; convolutions `[out, in * height * width]`; embeddings `[count, width]`; norms
    /// `[width, 1]` (their weight is `[width]`).
    pub shape: [usize; 2],
    /// Height and width of a convolution's kernel; its weight is stored `[out, in, height, width]`; `None` for
    /// everything else.
    pub kernel: Option<[usize; 2]>,
    /// Whether it has a bias (`[out]`).
    pub bias: bool,
    /// How tensors are named after the module.
    pub spelling: Spelling,
    /// Norms only: the gain applied is `1 + weight` (Gemma), so folds act on `1 + weight`.
    pub plus_one: bool,
}

impl Name {
    /// The weight tensor's name.
    pub fn weight(&self) -> String {
        self.tensor(Leaf::Weight)
    }

    /// The bias tensor's name, if the module has one.
    pub fn bias_name(&self) -> Option<String> {
        self.bias.then(|| self.tensor(Leaf::Bias))
    }

    /// The name of one of the module's tensors.
    pub fn tensor(&self, leaf: Leaf) -> String {
        let leaf = match leaf {
            Leaf::Weight => "weight",
            Leaf::Bias => "bias",
            Leaf::RunningMean => "running_mean",
            Leaf::RunningVar => "running_var",
        };
        match self.spelling {
            Spelling::Dotted => format!("{}.{leaf}", self.module),
            Spelling::Underscored => format!("{}_{leaf}", self.module),
            Spelling::Bare => self.module.clone(),
        }
    }

    /// All tensor names of the module.
    pub fn tensors(&self) -> Vec<String> {
        self.leaves().into_iter().map(|leaf| self.tensor(leaf)).collect()
    }

    /// The tensors that the module has, the weight first.
    pub fn leaves(&self) -> Vec<Leaf> {
        let mut leaves = vec![Leaf::Weight];
        leaves.extend(self.bias.then_some(Leaf::Bias));
        if self.role == Role::BatchNorm {
            leaves.extend([Leaf::RunningMean, Leaf::RunningVar]);
        }
        leaves
    }

    /// The shape of one of the module's tensors as it is stored in the checkpoint.
    pub fn leaf_shape(&self, leaf: Leaf) -> Vec<usize> {
        if leaf == Leaf::Weight { self.stored_shape() } else { vec![self.shape[0]] }
    }

    /// Output width of the linear layer.
    pub fn out_features(&self) -> usize {
        self.shape[0]
    }

    /// Input width of the linear layer.
    pub fn in_features(&self) -> usize {
        self.shape[1]
    }

    /// The weight's shape as it is stored in the checkpoint.
    pub fn stored_shape(&self) -> Vec<usize> {
        let [out, input] = self.shape;
        if let Some([height, width]) = self.kernel {
            vec![out, input / (height * width).max(1), height, width]
        } else if self.spelling == Spelling::Bare {
            vec![1, out, input]
        } else if self.role.is_norm() {
            vec![out]
        } else if self.transposed {
            vec![input, out]
        } else {
            self.shape.to_vec()
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.module)
    }
}
