//! The values a report is made of. Rendering lives in `terminal`, `json` and `html`.

use serde::Serialize;
use serde_json::Value;

use crate::human;

/// A whole report: a title, the figures that matter most, and sections.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// What was done, for example `"AWQ, 4 bits: almanac-3m"`.
    pub title: String,
    /// One line under the title.
    pub subtitle: String,
    /// The key figures, label and value, in reading order.
    pub summary: Vec<(String, String)>,
    /// The sections in reading order.
    pub sections: Vec<Section>,
}

/// A titled part of a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Section {
    /// The heading.
    pub title: String,
    /// What stands under it.
    pub blocks: Vec<Block>,
}

/// One element of a section.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Block {
    /// A paragraph (paragraphs, when it holds blank lines) of plain text.
    Text(String),
    /// A table.
    Table(Table),
    /// A chart.
    Chart(Chart),
    /// A claim with what was measured.
    Claim(Claim),
    /// Verbatim text: a command, a recipe, options.
    Code(String),
}

/// A table: every row holds one cell per column (missing cells count as empty, further ones are
/// left out).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// The caption; may be empty.
    pub title: String,
    /// The columns.
    pub columns: Vec<Column>,
    /// The rows.
    pub rows: Vec<Vec<Cell>>,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// The heading, which is also the key in JSON.
    pub name: String,
    /// How the cells are aligned.
    pub align: Align,
}

/// Alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Align {
    /// For text.
    Left,
    /// For numbers.
    Right,
}

/// One value of a table. JSON gets the bare number; people get human units.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// Text.
    Text(String),
    /// A number printed in full.
    Int(i64),
    /// A number printed with this many digits after the point; very small and very large values
    /// switch to scientific notation.
    Float(f64, usize),
    /// A size in bytes: `1.50 GiB`.
    Bytes(u64),
    /// A count: `3.27 M`.
    Count(u64),
    /// A time in seconds: `2 min 03 s`.
    Seconds(f64),
    /// A share between 0 and 1: `12.3 %`.
    Percent(f64),
    /// Nothing.
    Empty,
}

/// What a chart looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChartKind {
    /// Points joined by lines, one line per series; x is numeric, or an index into `categories`.
    Line,
    /// Grouped bars: x is the index of the category, y the length of the bar. Many or long-named
    /// categories lie down.
    Bar,
    /// Bars side by side: x is the centre of the bin (equally wide), y its count.
    Histogram,
    /// A grid of shades: a series is a row, x is the index of the column in `categories`, y the
    /// value. Values of both signs get two colours.
    Heat,
}

/// A chart.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Chart {
    /// The caption.
    pub title: String,
    /// What the x axis shows.
    pub x_label: String,
    /// What the y axis (for [`ChartKind::Heat`]: the shade) shows.
    pub y_label: String,
    /// What it looks like.
    pub kind: ChartKind,
    /// Names of the x positions 0, 1, ...; empty for a numeric axis.
    pub categories: Vec<String>,
    /// The data.
    pub series: Vec<Series>,
    /// Logarithmic y (values at or below zero are left out).
    pub log_y: bool,
}

/// A named list of points. Points that are not finite are left out of the drawing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Series {
    /// The name in the legend.
    pub name: String,
    /// `(x, y)` in drawing order.
    pub points: Vec<(f64, f64)>,
}

/// A claim and what was measured for it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Claim {
    /// The method's name.
    pub slug: String,
    /// The claim in one sentence.
    pub claim: String,
    /// What was measured.
    pub measured: Value,
    /// The same for the baselines.
    pub baselines: Value,
    /// The seeds that were run.
    pub seeds: Vec<u64>,
    /// Whether the claim holds; `None` means reported, not gated.
    pub holds: Option<bool>,
}

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>, subtitle: impl Into<String>) -> Self {
        Self { title: title.into(), subtitle: subtitle.into(), ..Self::default() }
    }

    /// Adds a key figure.
    pub fn fact(&mut self, label: impl Into<String>, value: impl Into<String>) {
        self.summary.push((label.into(), value.into()));
    }

    /// Adds a section and hands it back to be filled.
    pub fn section(&mut self, title: impl Into<String>) -> &mut Section {
        self.sections.push(Section { title: title.into(), blocks: Vec::new() });
        let last = self.sections.len() - 1;
        &mut self.sections[last]
    }

    /// All claims, in reading order.
    pub fn claims(&self) -> impl Iterator<Item = &Claim> {
        self.sections.iter().flat_map(|section| &section.blocks).filter_map(|block| match block {
            Block::Claim(claim) => Some(claim),
            _ => None,
        })
    }

    /// Whether no claim is known to fail.
    pub fn holds(&self) -> bool {
        self.claims().all(|claim| claim.holds != Some(false))
    }
}

impl Section {
    /// Adds a block.
    pub fn push(&mut self, block: impl Into<Block>) -> &mut Self {
        self.blocks.push(block.into());
        self
    }

    /// Adds a paragraph.
    pub fn text(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(Block::Text(text.into()))
    }

    /// Adds verbatim text.
    pub fn code(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(Block::Code(text.into()))
    }
}

impl From<Table> for Block {
    fn from(table: Table) -> Self {
        Self::Table(table)
    }
}

impl From<Chart> for Block {
    fn from(chart: Chart) -> Self {
        Self::Chart(chart)
    }
}

impl From<Claim> for Block {
    fn from(claim: Claim) -> Self {
        Self::Claim(claim)
    }
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: Vec<Column>) -> Self {
        Self { title: title.into(), columns, rows: Vec::new() }
    }

    /// The table with one row more.
    #[must_use]
    pub fn row(mut self, cells: Vec<Cell>) -> Self {
        self.push(cells);
        self
    }

    /// Adds a row.
    pub fn push(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }
}

impl Column {
    /// A column of text.
    pub fn left(name: impl Into<String>) -> Self {
        Self { name: name.into(), align: Align::Left }
    }

    /// A column of numbers.
    pub fn right(name: impl Into<String>) -> Self {
        Self { name: name.into(), align: Align::Right }
    }
}

impl Cell {
    /// A text cell.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// What people see.
    pub fn show(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Int(value) => value.to_string(),
            Self::Float(value, digits) => human::float(*value, *digits),
            Self::Bytes(value) => human::bytes(*value),
            Self::Count(value) => human::count(*value),
            Self::Seconds(value) => human::seconds(*value),
            Self::Percent(value) => human::percent(*value),
            Self::Empty => String::new(),
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Chart {
    /// A chart of a kind with no data yet.
    pub fn new(kind: ChartKind, title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            x_label: String::new(),
            y_label: String::new(),
            kind,
            categories: Vec::new(),
            series: Vec::new(),
            log_y: false,
        }
    }

    /// The chart with its axis labels.
    #[must_use]
    pub fn axes(mut self, x_label: impl Into<String>, y_label: impl Into<String>) -> Self {
        self.x_label = x_label.into();
        self.y_label = y_label.into();
        self
    }

    /// The chart with named x positions.
    #[must_use]
    pub fn over<T: Into<String>>(mut self, categories: impl IntoIterator<Item = T>) -> Self {
        self.categories = categories.into_iter().map(Into::into).collect();
        self
    }

    /// The chart with a further series of points.
    #[must_use]
    pub fn points(mut self, name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.series.push(Series { name: name.into(), points });
        self
    }

    /// The chart with a further series given by its y values; x counts from 0.
    #[must_use]
    pub fn values(self, name: impl Into<String>, values: &[f64]) -> Self {
        let points = values.iter().enumerate().map(|(i, v)| (i as f64, *v)).collect();
        self.points(name, points)
    }

    /// The chart with a logarithmic y axis.
    #[must_use]
    pub fn logarithmic(mut self) -> Self {
        self.log_y = true;
        self
    }
}
