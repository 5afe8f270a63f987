//! AdaDim: groups along the input or along the output, whichever hurts a layer's output less (Heo et
//! al. 2023, arXiv 2309.15531).
//!
//! A group of an integer grid usually holds consecutive inputs of one output row (*per output
//! channel*, OC): a channel with large activations then shares its step with its neighbours in every
//! row. A group of consecutive outputs inside one input channel (*per input channel*, IC) has such a
//! channel to itself. Neither is better for every layer, so every layer is quantised both ways and
//! the error at the output of its module decides.
//!
//! This file is options and mathematics on one matrix; `columns` is GPTQ with groups along the
//! output, `block` what happens to one block of a network.

use crate::gptq::{self, Factor, GptqOptions};
use crate::grid::{Granularity, Grid, GridOptions, Matrix, effective_group};
use crate::options::{Format, QuantizeOptions};
use crate::statistics::quadratic_error;
use crate::{Error, Plan, Result, rtn};
use nn::{Name, Role};
use store::packed::Stored;

mod block;
pub mod columns;
#[cfg(test)]
mod tests;

pub use block::quantize_block;

/// Options of AdaDim.
#[derive(
    Debug,
    Clone,
    Default,
    PartialEq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::Args,
)]
#[serde(default)]
pub struct AdadimOptions {
    /// Direction of a layer's groups
    #[arg(id = "adadim_dim", long = "dim", value_enum, default_value_t = Dim::Ada)]
    pub dim: Dim,
    /// What chooses the codes
    #[arg(id = "adadim_base", long = "base", value_enum, default_value_t = Base::Rtn)]
    pub base: Base,
    /// Where the error of a direction is measured
    #[arg(
        id = "adadim_objective",
        long = "dim-objective",
        value_enum,
        default_value_t = Objective::Module
    )]
    pub objective: Objective,
    /// Whose codes are compared when a direction is chosen: those of rounding, or those of GPTQ,
    /// which takes twice the time
    #[arg(
        id = "adadim_select_by",
        long = "select-by",
        value_enum,
        default_value_t = Base::Rtn
    )]
    pub select_by: Base,
    /// What later layers are calibrated on
    #[arg(
        id = "adadim_stream",
        long = "dim-stream",
        value_enum,
        default_value_t = Stream::Full
    )]
    pub stream: Stream,
    /// Order in which GPTQ takes the columns
    #[arg(
        id = "adadim_columns",
        long = "dim-columns",
        value_enum,
        default_value_t = ColumnOrder::EnergyStatic
    )]
    pub columns: ColumnOrder,
}

/// How a layer's direction is decided.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Dim {
    /// Per layer, by measured error.
    #[default]
    Ada,
    /// Along the input for every layer, as everywhere else.
    Oc,
    /// Along the output for every layer.
    Ic,
    /// Along the output for q, k, v and the last layer of the MLP, whose inputs carry the outliers
    /// of large models; along the input elsewhere.
    Heuristic,
}

/// What chooses codes.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// Round to nearest.
    #[default]
    Rtn,
    /// Column by column with error compensation; obeys the options of GPTQ.
    Gptq,
}

/// Where errors are measured.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// At the output of attention for q, k, v and of the MLP for its first half, at the layer's own
    /// output for the others.
    #[default]
    Module,
    /// At every layer's own output.
    Linear,
}

/// What flows on from a quantised layer during calibration.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// What the original layer computes (the reference code).
    #[default]
    Full,
    /// What the quantised layer computes, as GPTQ does it.
    Quantized,
}

/// In which order GPTQ takes columns.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum ColumnOrder {
    /// Decreasing activation energy, grids of groups along the input fixed beforehand (the reference
    /// code).
    #[default]
    EnergyStatic,
    /// Decreasing activation energy; groups along the input are then no neighbours.
    Energy,
    /// As stored.
    Stored,
}

/// Direction of a layer's groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Along the input, inside one output channel.
    Oc,
    /// Along the output, inside one input channel.
    Ic,
}

impl Direction {
    /// Both, in the order in which they are tried.
    pub const BOTH: [Self; 2] = [Self::Oc, Self::Ic];

    /// `oc` or `ic`, as in results.
    pub fn label(self) -> &'static str {
        match self {
            Self::Oc => "oc",
            Self::Ic => "ic",
        }
    }
}

impl Dim {
    /// The direction of a layer of `role`, where no measurement decides.
    pub fn fixed(self, role: Role) -> Option<Direction> {
        let outliers = matches!(
            role,
            Role::Query | Role::Key | Role::Value | Role::QueryKeyValue | Role::Down
        );
        match self {
            Self::Ada => None,
            Self::Oc => Some(Direction::Oc),
            Self::Ic => Some(Direction::Ic),
            Self::Heuristic => Some(if outliers { Direction::Ic } else { Direction::Oc }),
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Ada => "ada",
            Self::Oc => "oc",
            Self::Ic => "ic",
            Self::Heuristic => "heuristic",
        }
    }
}

impl AdadimOptions {
    /// Whether the method looks at activations.
    pub fn calibrates(&self) -> bool {
        self.dim == Dim::Ada || self.base == Base::Gptq
    }

    /// The options of GPTQ as this method uses it: `given`, in this method's order of columns.
    pub fn gptq(&self, given: &GptqOptions, grid: &GridOptions) -> GptqOptions {
        // With whole rows there is one grid, found before the first column anyway.
        let groups = grid.group_size > 0 && grid.granularity == Granularity::Group;
        GptqOptions {
            act_order: self.columns != ColumnOrder::Stored,
            static_groups: self.columns == ColumnOrder::EnergyStatic && groups,
            ..given.clone()
        }
    }

    /// Refuses options that contradict each other or the rest of the job.
    pub fn check(&self, job: &QuantizeOptions) -> Result<()> {
        if job.grid.granularity == Granularity::Tensor {
            return Err(Error::Options(
                "--granularity tensor is one grid for all weights and has no direction: use \
                 --method rtn or gptq, or --granularity group"
                    .into(),
            ));
        }
        if self.select_by == Base::Gptq && self.base == Base::Rtn {
            return Err(Error::Options(
                "--select-by gptq compares codes that --base rtn does not write: add --base gptq, \
                 or drop --select-by"
                    .into(),
            ));
        }
        if job.gptq.act_order || job.gptq.static_groups {
            return Err(Error::Options(
                "adadim orders columns by --dim-columns (energy-static is --act-order with \
                 --static-groups): drop --act-order and --static-groups"
                    .into(),
            ));
        }
        if self.dim == Dim::Ada && !holds_columns(job.format) {
            return Err(Error::Options(format!(
                "--dim ada may choose groups along the output, which the {} format cannot hold: \
                 use --format strata or dequantized, or --dim oc",
                job.format.name()
            )));
        }
        Ok(())
    }
}

/// Whether a file format can hold groups along the output.
fn holds_columns(format: Format) -> bool {
    matches!(format, Format::Strata | Format::Dequantized)
}

/// Refuses a plan whose format cannot hold the directions that are fixed beforehand.
pub fn check_plan(plan: &Plan, options: &QuantizeOptions) -> Result<()> {
    let dim = options.adadim.dim;
    if holds_columns(options.format) {
        return Ok(());
    }
    let along_output: Vec<&str> = plan
        .layers()
        .filter(|layer| layer.grid.is_some())
        .filter(|layer| dim.fixed(layer.name.role) == Some(Direction::Ic))
        .map(|layer| layer.name.module.as_str())
        .collect();
    if along_output.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 8;
    let rest = along_output.len().saturating_sub(SHOWN);
    Err(Error::Options(format!(
        "--dim {} puts groups along the output, which the {} format cannot hold, in {} layers ({}{}): \
         use --format strata or dequantized, or --dim oc",
        dim.label(),
        options.format.name(),
        along_output.len(),
        along_output.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", "),
        if rest > 0 { format!(", and {rest} more") } else { String::new() },
    )))
}

/// Rounds `matrix` (`[out, in]`) to nearest with groups in `direction`.
pub fn round(matrix: &Matrix, grid: &Grid, options: &GridOptions, direction: Direction) -> Stored {
    match direction {
        Direction::Oc => Stored::Grid(rtn::quantize(matrix, grid, options)),
        Direction::Ic => Stored::Columns(rtn::quantize(&matrix.transposed(), grid, options)),
    }
}

/// Quantises `matrix` (`[out, in]`) by GPTQ with groups in `direction`; returns `Σ E²` beside it.
///
/// # Errors
/// A weight of another width than the Hessian's.
pub fn compensate(
    layer: &str,
    matrix: &Matrix,
    factor: &Factor,
    grid: &Grid,
    grid_options: &GridOptions,
    options: &GptqOptions,
    direction: Direction,
) -> Result<(Stored, f64)> {
    match direction {
        Direction::Oc => {
            let result = gptq::quantize(layer, matrix, factor, grid, grid_options, options)?;
            Ok((Stored::Grid(result.matrix), result.loss))
        }
        Direction::Ic => {
            let (found, loss) =
                columns::quantize(layer, matrix, factor, grid, grid_options, options)?;
            Ok((Stored::Columns(found), loss))
        }
    }
}

/// Mean squared error, per token and output, at the layer's own output:
/// `tr((W - Ŵ) C (W - Ŵ)ᵀ) / out` with `covariance` `C = XᵀX / tokens`.
pub fn linear_error(matrix: &Matrix, values: &[f32], covariance: &[f32]) -> f64 {
    let difference: Vec<f32> = matrix.values.iter().zip(values).map(|(w, q)| w - q).collect();
    quadratic_error(&difference, covariance, matrix.in_features) / matrix.out_features as f64
}

/// The direction with the smaller error; of equal errors, along the input.
///
/// # Errors
/// Errors that are not finite: the network overflows on the calibration text.
pub fn choose(layer: &str, [oc, ic]: [f64; 2]) -> Result<Direction> {
    if !(oc.is_finite() && ic.is_finite()) {
        return Err(Error::layer(
            layer,
            format!(
                "the output error of a direction is not a number ({oc} along the input, {ic} along \
                 the output); the model overflows on the calibration text"
            ),
        ));
    }
    Ok(if ic < oc { Direction::Ic } else { Direction::Oc })
}

/// What to say about a layer whose last group is shorter than the others.
fn short_group(name: &Name, options: &GridOptions, direction: Direction) -> Option<String> {
    let (length, what) = match direction {
        Direction::Oc => (name.in_features(), "inputs"),
        Direction::Ic => (name.out_features(), "outputs"),
    };
    let asked = match options.granularity {
        Granularity::Group if options.group_size > 0 => options.group_size,
        _ => return None,
    };
    let rest = length % asked;
    (rest != 0).then(|| {
        let last = if effective_group(options, length) < asked { "only" } else { "last" };
        format!("{length} {what} in groups of {asked}: the {last} one holds {rest}")
    })
}
