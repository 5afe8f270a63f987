//! JSON: bare numbers under the names people see. Numbers that are not finite become null.

use serde_json::{Map, Value, json};

use crate::{Block, Cell, Chart, Claim, Report, Table};

impl Report {
    /// The whole report as JSON.
    pub fn json(&self) -> Value {
        let summary: Map<String, Value> = self
            .summary
            .iter()
            .map(|(label, value)| (label.clone(), Value::String(value.clone())))
            .collect();
        let sections: Vec<Value> = self
            .sections
            .iter()
            .map(|section| {
                let blocks: Vec<Value> = section.blocks.iter().map(block).collect();
                json!({"title": section.title, "blocks": blocks})
            })
            .collect();
        json!({
            "title": self.title,
            "subtitle": self.subtitle,
            "summary": summary,
            "sections": sections,
        })
    }
}

impl Table {
    /// The rows as a list of objects keyed by column name. A name that occurs twice gets a number.
    pub fn json(&self) -> Value {
        let mut keys: Vec<String> = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            let mut key = column.name.clone();
            let mut n = 2;
            while keys.contains(&key) {
                key = format!("{} {n}", column.name);
                n += 1;
            }
            keys.push(key);
        }
        let rows = self.rows.iter().map(|row| {
            let values = row.iter().map(cell).chain(std::iter::repeat(Value::Null));
            Value::Object(keys.iter().cloned().zip(values).collect())
        });
        Value::Array(rows.collect())
    }
}

impl Claim {
    /// The claim as an object: slug, claim, measured, baselines, seeds, holds.
    pub fn json(&self) -> Value {
        json!({
            "slug": self.slug,
            "claim": self.claim,
            "measured": self.measured,
            "baselines": self.baselines,
            "seeds": self.seeds,
            "holds": self.holds,
        })
    }
}

fn block(block: &Block) -> Value {
    match block {
        Block::Text(text) => json!({"type": "text", "text": text}),
        Block::Code(text) => json!({"type": "code", "text": text}),
        Block::Table(table) => {
            let columns: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
            json!({"type": "table", "title": table.title, "columns": columns, "rows": table.json()})
        }
        Block::Chart(chart) => chart_json(chart),
        Block::Claim(claim) => {
            let mut value = json!({"type": "claim"});
            if let (Some(value), Value::Object(fields)) = (value.as_object_mut(), claim.json()) {
                value.extend(fields);
            }
            value
        }
    }
}

fn chart_json(chart: &Chart) -> Value {
    json!({
        "type": "chart",
        "kind": chart.kind,
        "title": chart.title,
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "log_y": chart.log_y,
        "categories": chart.categories,
        "series": chart.series,
    })
}

fn cell(cell: &Cell) -> Value {
    match cell {
        Cell::Text(text) => Value::String(text.clone()),
        Cell::Int(value) => Value::from(*value),
        Cell::Bytes(value) | Cell::Count(value) => Value::from(*value),
        Cell::Float(value, _) | Cell::Seconds(value) | Cell::Percent(value) => Value::from(*value),
        Cell::Empty => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChartKind, Column};

    #[test]
    fn rows_are_keyed_by_column() {
        let table =
            Table::new("t", vec![Column::left("a"), Column::right("b"), Column::right("a")])
                .row(vec!["x".into(), Cell::Float(f64::NAN, 2), Cell::Percent(0.5)])
                .row(vec!["y".into()]);
        assert_eq!(
            table.json(),
            json!([{"a": "x", "b": null, "a 2": 0.5}, {"a": "y", "b": null, "a 2": null}])
        );
    }

    #[test]
    fn a_report_is_complete() {
        let mut report = Report::new("T", "s");
        report.fact("size", "1 B");
        let claim = Claim {
            slug: "awq".into(),
            claim: "c".into(),
            measured: json!({"p": 1.5}),
            baselines: json!({}),
            seeds: vec![0, 1],
            holds: Some(false),
        };
        report
            .section("S")
            .text("words")
            .push(claim)
            .push(Chart::new(ChartKind::Bar, "c").values("s", &[1.0, f64::NAN]));
        assert!(!report.holds());
        let value = report.json();
        let blocks = &value["sections"][0]["blocks"];
        assert_eq!(value["summary"]["size"], "1 B");
        assert_eq!(blocks[0], json!({"type": "text", "text": "words"}));
        assert_eq!(blocks[1]["holds"], false);
        assert_eq!(blocks[1]["seeds"], json!([0, 1]));
        assert_eq!(blocks[2]["kind"], "bar");
        assert_eq!(blocks[2]["series"][0]["points"], json!([[0.0, 1.0], [1.0, null]]));
    }
}
