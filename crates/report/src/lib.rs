//! One [`Report`] value rendered to terminal, JSON and self-contained HTML; progress bars; human
//! units.
//!
//! Whatever Strata tells its user is built once as a [`Report`] (sections of text, tables, charts
//! and claims) or a single [`Table`], and rendered three ways: [`Report::terminal`],
//! [`Report::json`] and [`Report::html`]. Nothing here computes anything about a network, and
//! nothing here writes files.
//!
//! ```
//! # use strata_report as report;
//! use report::{Cell, Column, Style, Table};
//! let table = Table::new("Size", vec![Column::left("layer"), Column::right("bytes")])
//!     .row(vec![Cell::text("lm_head"), Cell::Bytes(1536)]);
//! assert_eq!(table.json()[0]["bytes"], 1536);
//! assert!(table.terminal(Style::plain()).contains("1.50 KiB"));
//! ```

pub mod human;

mod facts;
mod html;
mod json;
mod messages;
mod model;
mod progress;
mod scale;
mod style;
mod svg;
mod terminal;

pub use messages::{detail, note, set_verbosity, verbosity, warn};
pub use model::{
    Align, Block, Cell, Chart, ChartKind, Claim, Column, Report, Section, Series, Table,
};
pub use progress::Progress;
pub use style::Style;
