//! Tensors as a tree of their dotted names, with sums at every node.

use report::{Cell, Table};
use serde_json::{Value, json};

use super::rows::{Row, columns};
use super::statistics::Statistics;

/// A node: a module, or (as a leaf) a tensor.
pub struct Node<'a> {
    name: String,
    children: Vec<Node<'a>>,
    row: Option<&'a Row>,
    parameters: u64,
    bytes: u64,
    statistics: Option<Statistics>,
}

impl<'a> Node<'a> {
    /// The tree of all rows; the root has no name.
    pub fn of(rows: &'a [Row]) -> Self {
        let mut root = Node::new("");
        for row in rows {
            let mut node = &mut root;
            node.add(row);
            for part in row.name.split('.') {
                let at = match node.children.iter().position(|c| c.name == part) {
                    Some(at) => at,
                    None => {
                        node.children.push(Node::new(part));
                        node.children.len() - 1
                    }
                };
                node = &mut node.children[at];
                node.add(row);
            }
            node.row = Some(row);
        }
        root.settle();
        root
    }

    fn new(name: &str) -> Self {
        Node {
            name: name.to_string(),
            children: Vec::new(),
            row: None,
            parameters: 0,
            bytes: 0,
            statistics: None,
        }
    }

    fn add(&mut self, row: &Row) {
        self.parameters += row.parameters;
        self.bytes += row.bytes;
        if let Some(more) = row.statistics {
            self.statistics = Some(self.statistics.unwrap_or_default().plus(more));
        }
    }

    /// Sorts children (numbers by value) and merges a node with its only child.
    fn settle(&mut self) {
        for child in &mut self.children {
            child.settle();
            while child.row.is_none() && child.children.len() == 1 {
                if let Some(only) = child.children.pop() {
                    child.name = format!("{}.{}", child.name, only.name);
                    child.row = only.row;
                    child.children = only.children;
                }
            }
        }
        self.children.sort_by_key(|c| {
            let number = c.name.split('.').next().and_then(|n| n.parse::<u64>().ok());
            (
                number.unwrap_or(u64::MAX),
                if number.is_some() { String::new() } else { c.name.clone() },
            )
        });
    }

    /// The tree as a table, down to `depth` levels.
    pub fn table(&self, depth: usize) -> Table {
        let mut table = Table::new("", columns("module"));
        for child in &self.children {
            child.rows(&mut table, "", "", depth);
        }
        table
    }

    fn rows(&self, table: &mut Table, own: &str, below: &str, depth: usize) {
        if depth == 0 {
            return;
        }
        let label = format!("{own}{}", self.name);
        match self.row {
            Some(row) => table.push(row.cells(label)),
            None => {
                let mut cells = vec![Cell::Text(label), Cell::Empty, Cell::Empty, Cell::Empty];
                cells.extend([Cell::Count(self.parameters), Cell::Bytes(self.bytes)]);
                cells.extend(Statistics::cells(self.statistics.as_ref()));
                table.push(cells);
            }
        }
        let last = self.children.len().saturating_sub(1);
        for (i, child) in self.children.iter().enumerate() {
            let (branch, line) = if i == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            let (own, below) = (format!("{below}{branch}"), format!("{below}{line}"));
            child.rows(table, &own, &below, depth - 1);
        }
    }

    /// The tree for scripts, down to `depth` levels.
    pub fn json(&self, depth: usize) -> Value {
        let mut value = match self.row {
            Some(row) => row.json(),
            None => json!({
                "parameters": self.parameters,
                "bytes": self.bytes,
                "statistics": Statistics::json(self.statistics.as_ref()),
            }),
        };
        if let Some(object) = value.as_object_mut() {
            if self.row.is_none() {
                object.insert("name".into(), Value::String(self.name.clone()));
            }
            if !self.children.is_empty() && depth > 0 {
                let children = self.children.iter().map(|c| c.json(depth - 1)).collect();
                object.insert("children".into(), Value::Array(children));
            }
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use report::Style;

    fn row(name: &str, parameters: u64) -> Row {
        Row {
            name: name.into(),
            role: None,
            block: None,
            dtype: "F32".into(),
            shape: vec![parameters as usize],
            parameters,
            bytes: parameters * 4,
            statistics: None,
        }
    }

    #[test]
    fn numbers_sort_by_value_and_nodes_hold_sums() {
        let rows = [
            row("m.layers.10.w", 1),
            row("m.layers.2.w", 2),
            row("m.layers.2.b", 3),
            row("lm_head.weight", 4),
        ];
        let root = Node::of(&rows);
        assert_eq!((root.parameters, root.bytes), (10, 40));
        let text = root.table(usize::MAX).terminal(Style::plain());
        let names: Vec<&str> =
            text.lines().skip(2).filter_map(|l| l.split("  ").next()).map(str::trim_end).collect();
        assert_eq!(names, ["lm_head.weight", "m.layers", "├─ 2", "│", "│", "└─ 10.w"]);
        assert_eq!(root.json(1)["children"][1]["parameters"], 6);
        assert!(root.json(0).get("children").is_none());
    }
}
