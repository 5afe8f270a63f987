//! The plan of a job: what will be done with every tensor, known before any weight is read.

use crate::grid::{Granularity, GridOptions, effective_group, require_whole_groups};
use crate::options::{Format, QuantizeOptions};
use crate::{Error, Result};
use method::Pattern;
use nn::{Decoder, Name};
use store::Checkpoint;
use store::packed::QuantizedMatrix;

/// What happens to one linear layer.
#[derive(Debug, Clone)]
pub struct LayerPlan {
    /// The layer.
    pub name: Name,
    /// Its grid, or `None` when it is not quantised.
    pub grid: Option<GridOptions>,
    /// The share of its weights that become zero, or `None` when it is not pruned.
    pub sparsity: Option<f64>,
}

/// What will be done, block by block.
#[derive(Debug, Clone)]
pub struct Plan {
    /// For every block the linears in the order they compute, grouped by the input they share.
    pub blocks: Vec<Vec<Vec<LayerPlan>>>,
    /// Bytes of all tensors now.
    pub bytes_before: u64,
    /// Estimated bytes afterwards.
    pub bytes_after: u64,
}

impl Plan {
    /// Plans `options` for a model; refuses what cannot work.
    pub fn new(
        decoder: &Decoder,
        checkpoint: &Checkpoint,
        options: &QuantizeOptions,
    ) -> Result<Self> {
        options.check()?;
        crate::runner::refuse_quantized(checkpoint)?;
        crate::awq::Prepared::new(decoder, options)?;
        let exclude = patterns(&options.exclude)?;
        let only = patterns(&options.only)?;
        let overrides: Vec<Pattern> =
            options.overrides.iter().map(|o| pattern(&o.pattern)).collect::<Result<_>>()?;
        let named = options.exclude.iter().zip(&exclude).chain(options.only.iter().zip(&only));
        let named =
            named.chain(options.overrides.iter().map(|o| &o.pattern).zip(&overrides)).collect();
        check_patterns(decoder, named)?;
        let mut plan = Self {
            blocks: Vec::new(),
            bytes_before: checkpoint.total_bytes(),
            bytes_after: checkpoint.total_bytes(),
        };
        let mut quantised = 0usize;
        for block in 0..decoder.num_blocks() {
            let mut sets = Vec::new();
            for set in decoder.linear_sets(block) {
                let mut layers = Vec::new();
                for name in set {
                    let kept = exclude.iter().any(|p| p.matches(&name.module))
                        || (!only.is_empty() && !only.iter().any(|p| p.matches(&name.module)));
                    let mut grid = options.grid.clone();
                    let found = overrides.iter().position(|p| p.matches(&name.module));
                    if let Some(other) = found.and_then(|i| options.overrides.get(i)) {
                        grid.bits = other.bits.unwrap_or(grid.bits);
                        grid.group_size = other.group_size.unwrap_or(grid.group_size);
                        grid.symmetric = other.symmetric.unwrap_or(grid.symmetric);
                        crate::grid::Grid::new(&grid)?;
                    }
                    let grid = if kept || !options.quantises() { None } else { Some(grid) };
                    if let Some(grid) = &grid {
                        check_shape(&name, grid, options)?;
                        plan.bytes_after = plan
                            .bytes_after
                            .saturating_sub(saved(checkpoint, &name, grid, options)?);
                        quantised += 1;
                    }
                    layers.push(LayerPlan { name, grid, sparsity: None });
                }
                sets.push(layers);
            }
            plan.blocks.push(sets);
        }
        if quantised == 0 && options.quantises() {
            return Err(Error::Options(
                "nothing is left to quantise; loosen --only or --exclude".into(),
            ));
        }
        if options.method == crate::Method::Adadim {
            crate::adadim::check_plan(&plan, options)?;
        }
        Ok(plan)
    }

    /// The same plan for the same network under other names (those of `decoder`).
    pub fn renamed(&self, decoder: &Decoder) -> Self {
        let mut plan = self.clone();
        for (block, sets) in plan.blocks.iter_mut().enumerate() {
            let names = decoder.linear_sets(block).into_iter().flatten();
            for (layer, name) in sets.iter_mut().flatten().zip(names) {
                layer.name = name;
            }
        }
        plan
    }

    /// All layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = &LayerPlan> {
        self.blocks.iter().flatten().flatten()
    }
}

/// Refuses patterns that match no layer, with the nearest name.
pub(crate) fn check_patterns(decoder: &Decoder, named: Vec<(&String, &Pattern)>) -> Result<()> {
    let all: Vec<String> = (0..decoder.num_blocks())
        .flat_map(|i| decoder.linears(i))
        .map(|name| name.module)
        .collect();
    for (text, pattern) in named {
        // The head and the embedding are never compressed; excluding them by name is no mistake.
        let known = all.iter().any(|name| pattern.matches(name))
            || decoder.other_names().iter().any(|name| pattern.matches(&name.module))
            || pattern.matches("lm_head");
        if !known {
            // Patterns usually name the end of a layer's name: compare with every end.
            let bare = text.trim_matches(['*', '.']);
            let ends = all.iter().flat_map(|name| {
                let tails = name.match_indices('.').filter_map(move |(at, _)| name.get(at + 1..));
                std::iter::once(name.as_str()).chain(tails)
            });
            let near = method::nearest(bare, ends);
            return Err(Error::Options(format!(
                "pattern `{text}` matches no layer{}",
                near.map(|n| format!("; the nearest name is `{n}`")).unwrap_or_default()
            )));
        }
    }
    Ok(())
}

fn pattern(text: &str) -> Result<Pattern> {
    Pattern::new(text).map_err(Error::Options)
}

pub(crate) fn patterns(texts: &[String]) -> Result<Vec<Pattern>> {
    texts.iter().map(|text| pattern(text)).collect()
}

/// Refuses a grid that the format has no place for.
pub(crate) fn check_shape(
    name: &Name,
    grid: &GridOptions,
    options: &QuantizeOptions,
) -> Result<()> {
    if options.method == crate::Method::Pvq {
        options.pvq.layer(name, grid.bits, options.grid.bits)?;
        return Ok(());
    }
    let width = name.in_features();
    // Formats of other tools and AWQ's searches need whole groups.
    let ragged = matches!(options.format, Format::Dequantized | Format::Strata);
    let whole = !ragged || options.method == crate::Method::Awq;
    if whole && grid.granularity == Granularity::Group {
        require_whole_groups(&name.module, width, effective_group(grid, width))?;
        if grid.group_size > width {
            require_whole_groups(&name.module, width, grid.group_size)?;
        }
    }
    let Some(layout) = options.format.layout() else { return Ok(()) };
    Ok(store::packed::check_packable(layout, &name.module, &stored_shape(name, grid))?)
}

/// What `name` becomes on a grid, without its codes: enough to know what it takes.
pub(crate) fn stored_shape(name: &Name, grid: &GridOptions) -> QuantizedMatrix {
    QuantizedMatrix {
        bits: grid.bits,
        group_size: effective_group(grid, name.in_features()),
        out_features: name.out_features(),
        in_features: name.in_features(),
        codes: Vec::new(),
        scales: Vec::new(),
        zeros: Vec::new(),
        symmetric: grid.symmetric,
        group_index: None,
    }
}

/// Bytes that quantising `name` saves.
fn saved(
    checkpoint: &Checkpoint,
    name: &Name,
    grid: &GridOptions,
    options: &QuantizeOptions,
) -> Result<u64> {
    let Some(layout) = options.format.layout() else { return Ok(0) };
    let now = checkpoint.info(&name.weight())?.nbytes;
    if options.method == crate::Method::Pvq {
        let code = options.pvq.layer(name, grid.bits, options.grid.bits)?;
        let weights = (name.out_features() * name.in_features()) as f64;
        return Ok(now.saturating_sub((code.stored_bits_per_weight() * weights / 8.0) as u64));
    }
    Ok(now.saturating_sub(store::packed::stored_bytes(layout, &stored_shape(name, grid))))
}
